"""The wishes of a caller. Everything left out takes the server's default."""

from __future__ import annotations

from dataclasses import dataclass

from prefilld import wire


@dataclass(frozen=True)
class Layout:
    """How the KV cache is to arrive.

    block_tokens: 16, 32, 64 or 128.
    order: "nhd" [block_tokens, num_heads, head_dim] or "hnd" [num_heads, block_tokens, head_dim].
    dtype: "bf16", "fp16", "fp32"; None is the one the server computes in.
    first_head, num_heads: a range of KV heads; num_heads 0 is all from first_head on.
    first_block: blocks before it are not sent; equal to the number of blocks of the prompt, no KV is.
    """

    block_tokens: int = 16
    order: str = "nhd"
    dtype: str | None = None
    first_head: int = 0
    num_heads: int = 0
    first_block: int = 0

    def to_wire(self):
        return wire.KvLayoutRequest(
            block_tokens=self.block_tokens,
            order=wire.enum_value("KvOrder", self.order),
            dtype=wire.enum_value("DType", self.dtype or "unspecified"),
            first_head=self.first_head,
            num_heads=self.num_heads,
            first_block=self.first_block,
        )


@dataclass(frozen=True)
class Attention:
    """How attention is computed; ranges and meaning stand at AttentionOptions in prefill.proto.

    policy: one of {policies}.
    A server refuses the baselines unless its operator allows them by name.
    None, for the policy and for each of the others, leaves the choice to the server. A gamma without
    vertical_slash_gamma is that of vertical-slash as well.
    recall_audit_rows: query blocks per layer on which recall is measured; result.total.recall has it.
    """

    policy: str | None = None
    gamma: float | None = None
    vertical_slash_gamma: float | None = None
    tau: float | None = None
    delta: float | None = None
    coverage: float | None = None
    score_threshold: float | None = None
    score_stride: int | None = None
    last_rows_gamma: float | None = None
    min_budget_tokens: int | None = None
    same_layer_sharing: bool | None = None
    density: float | None = None
    recall_audit_rows: int | None = None

    def to_wire(self):
        fields = {name: value for name, value in vars(self).items() if value is not None}
        fields["policy"] = wire.enum_value("AttentionPolicy", self.policy or "unspecified")
        return wire.AttentionOptions(**fields)


# The contract's own list, so that help(Attention) names every policy.
if Attention.__doc__ is not None:  # python -OO drops it
    Attention.__doc__ = Attention.__doc__.format(policies=", ".join(wire.enum_names("AttentionPolicy")))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the default is greedy. top_logprobs: 0 to 20 most likely tokens reported."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    top_logprobs: int = 0

    def to_wire(self):
        return wire.Sampling(**vars(self))
