"""The wishes of a caller. Everything left out takes the server's default."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Union

from prefilld import wire

MAX_LANES = 16
Lanes = Union[int, Literal["auto"]]


@dataclass(frozen=True)
class Layout:
    """How the KV cache is to arrive.

    block_tokens: 16, 32, 64 or 128.
    order: of a block's axes: "nhd" [block_tokens, num_heads, head_dim], "hnd" [num_heads, block_tokens, head_dim], or
    with K and V in one block "nh2d" [block_tokens, num_heads, 2, head_dim], "hn2d" [num_heads, block_tokens, 2, head_dim].
    dtype: "bf16", "fp16", "fp32" or "fp8_e4m3"; None is the one the server computes in.
    scales: of "fp8_e4m3", "per_token" (and head; None is this) or "per_block" (and head).
    first_head, num_heads: a range of KV heads; num_heads 0 is all from first_head on.
    first_block: blocks before it are not sent; equal to the number of blocks of the prompt, no KV is.
    """

    block_tokens: int = 16
    order: str = "nhd"
    dtype: str | None = None
    first_head: int = 0
    num_heads: int = 0
    first_block: int = 0
    scales: str | None = None

    @classmethod
    def from_wire(cls, message) -> Layout:
        """Returns what a KvLayoutRequest says, such as GenerateStarted.kv_layout."""
        return cls(
            block_tokens=message.block_tokens,
            order=wire.enum_name("KvOrder", message.order),
            dtype=wire.enum_name("DType", message.dtype) if message.dtype else None,
            first_head=message.first_head,
            num_heads=message.num_heads,
            first_block=message.first_block,
            scales=wire.enum_name("KvScales", message.scales) if message.scales else None,
        )

    def to_wire(self):
        return wire.KvLayoutRequest(
            block_tokens=self.block_tokens,
            order=wire.enum_value("KvOrder", self.order),
            dtype=wire.enum_value("DType", self.dtype or "unspecified"),
            first_head=self.first_head,
            num_heads=self.num_heads,
            first_block=self.first_block,
            scales=wire.enum_value("KvScales", self.scales or "unspecified"),
        )


@dataclass(frozen=True)
class Attention:
    """How attention is computed; ranges and meaning stand at AttentionOptions in attention.proto.

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


@dataclass(frozen=True)
class Delivery:
    """Has the KV cache pushed to a receiver instead of coming back on the call.

    address: host:port of the receiver, which must be on the server's allow-list. transfer_id: the id under which
    the receiver expects the cache.
    """

    address: str
    transfer_id: str

    def to_wire(self):
        return wire.DeliverTo(**vars(self))


@dataclass(frozen=True)
class Push:
    """One of several receivers to which the KV cache is pushed, each in a layout of its own: see Delivery.

    lanes: as in PrefillArguments; "auto" is chosen by the server.
    """

    address: str
    transfer_id: str
    layout: Layout = Layout()
    lanes: Lanes = "auto"

    def to_wire(self):
        target = wire.DeliverTo(address=self.address, transfer_id=self.transfer_id)
        return wire.Push(deliver_to=target, layout=self.layout.to_wire(), num_lanes=_num_lanes(self.lanes))


class PrefillArguments(TypedDict, total=False):
    """The arguments of prefill() and submit(), for the blocking client and the one of asyncio.

    layout, attention, sampling: see Layout, Attention and Sampling.
    lanes: 1 to 16 parallel streams for the KV, each on a connection of its own. One connection carries
    2 to 3 GB/s at most. "auto": 4 where the KV of the prompt has 8 MiB or more, else 1. What a token's KV takes is
    known from what the server accepted before, so a client's first call has one. It is one for a name that stands
    for several machines, and where the server or the tenant may not have more.
    deliver_to: pushes the cache elsewhere; iterating then brings nothing, and result comes at the end.
    pushes: as deliver_to, to several receivers; layout is not used. result.pushes says of each how it ended.
    request_id: names the request in logs; empty: the server chooses one.
    model_fingerprint: if it is set, a server refuses to run another model.
    layer_stats: result.layers has one entry per layer.
    prompt_logprobs: result.prompt_logprobs[i] is the natural log-probability of tokens[i + 1] and
    result.best_logprobs[i] that of the likeliest token there: equal where the prompt goes on as greedy
    decoding would have. On a GPU they come from logits rounded to bf16, so that several tokens may
    count as the likeliest. The result, and with it the first token, comes after that pass, which takes
    result.logprobs_us. numpy.array(result.prompt_logprobs) copies them at once.
    bypass_prefix_cache, cache_salt: if the server has a prefix cache, a prompt that begins as an earlier
    one did computes the rest alone; result.cached_tokens counts what was cached. Prompts share prefixes
    with those of an equal cache_salt alone. With bypass_prefix_cache the cache is neither asked nor filled.
    receivers: how many receive the KV of this one computation, this call included, 1 to 16; the others call
    attach_receiver() with the request_id and receiver_key, which the server chooses and PrefillStream tells
    if they are empty. A key has 32 to 128 characters and is nobody else's: secrets.token_hex(32).
    priority: -7 to 7. Requests of higher classes go first, as far as the server's operator lets you
    (PrefillStream.priority).
    metadata: goes with the call. Servers that tell tenants apart look there: ("x-tenant", "search") where they trust
    you; a token is better shown by the client's token_file. ("traceparent", ...) and ("tracestate", ...) place the
    call in a trace (W3C Trace Context).
    resumable: if the server grants it, a connection that breaks costs a moment and not the prompt, and a frame that
    arrives damaged comes again. The server then hears of a cancel by a call of its own.
    timeout: seconds until the whole call must be done; None: no limit.
    on_progress: on_progress(Progress) is called after each layer and while the request waits, from
    within the iteration.
    """

    layout: Layout
    attention: Attention
    sampling: Sampling
    lanes: Lanes
    deliver_to: Delivery | None
    pushes: Sequence[Push]
    request_id: str
    model_fingerprint: str
    layer_stats: bool
    prompt_logprobs: bool
    bypass_prefix_cache: bool
    cache_salt: str
    receivers: int
    receiver_key: str
    priority: int
    metadata: Sequence[tuple[str, str]]
    resumable: bool
    timeout: float | None
    on_progress: Callable[[Any], None] | None


class ReceiverArguments(TypedDict, total=False):
    """The arguments of attach_receiver(), for the blocking client and the one of asyncio: as in PrefillArguments."""

    layout: Layout
    lanes: Lanes
    model_fingerprint: str
    metadata: Sequence[tuple[str, str]]
    resumable: bool
    timeout: float | None
    on_progress: Callable[[Any], None] | None


class GenerateArguments(TypedDict, total=False):
    """The arguments of generate(), for the blocking client and the one of asyncio.

    attention, sampling, request_id, metadata, timeout: as in PrefillArguments; priority is that of the prefill.
    stop_token_ids: tokens that end the generation. ignore_eos: the model's own do not.
    on_progress: on_progress(PrefillProgress) is called while the prompt is prefilled.
    pushed_transfer_id: if it is set, the worker does not call a prefilld but waits for the cache to be pushed under
    this id. wait_started() of the stream then says what the cache must look like, and PrefillArguments.deliver_to has
    it pushed.
    """

    attention: Attention
    sampling: Sampling
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    request_id: str
    priority: int
    metadata: Sequence[tuple[str, str]]
    timeout: float | None
    on_progress: Callable[[Any], None] | None
    pushed_transfer_id: str


@dataclass(frozen=True)
class Call:
    """A request as it goes on the wire, and what goes with it.

    method: of the service, for calls that bring KV. num_tokens: of the prompt whose KV comes.
    """

    request: Any
    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    on_progress: Callable[[Any], None] | None
    method: str = "Prefill"
    num_tokens: int = 0


def prefill_call(
    tokens: Sequence[int],
    layout: Layout = Layout(),
    attention: Attention = Attention(),
    sampling: Sampling = Sampling(),
    lanes: Lanes = "auto",
    deliver_to: Delivery | None = None,
    pushes: Sequence[Push] = (),
    request_id: str = "",
    model_fingerprint: str = "",
    layer_stats: bool = False,
    prompt_logprobs: bool = False,
    bypass_prefix_cache: bool = False,
    cache_salt: str = "",
    receivers: int = 1,
    receiver_key: str = "",
    priority: int = 0,
    metadata: Sequence[tuple[str, str]] = (),
    resumable: bool = False,
    timeout: float | None = None,
    on_progress: Callable[[Any], None] | None = None,
) -> Call:
    """Makes a PrefillRequest of PrefillArguments."""
    num_lanes = _num_lanes(lanes)
    request = wire.PrefillRequest(
        request_id=request_id or (secrets.token_hex(16) if resumable else ""),
        resume_key=secrets.token_hex(16) if resumable else "",
        model_fingerprint=model_fingerprint,
        token_ids=tokens,
        layout=layout.to_wire(),
        attention=attention.to_wire(),
        sampling=sampling.to_wire(),
        num_lanes=num_lanes,
        deliver_to=None if deliver_to is None else deliver_to.to_wire(),
        pushes=[push.to_wire() for push in pushes],
        layer_stats=layer_stats,
        prompt_logprobs=prompt_logprobs,
        prefix_cache=wire.PrefixCacheOptions(bypass=bypass_prefix_cache, salt=cache_salt),
        num_receivers=receivers,
        receiver_key=receiver_key,
        priority=priority,
    )
    return Call(request, tuple(metadata), timeout, on_progress, num_tokens=len(request.token_ids))


def receiver_call(
    request_id: str,
    receiver_key: str,
    receiver: int,
    num_tokens: int,
    layout: Layout = Layout(),
    lanes: Lanes = "auto",
    model_fingerprint: str = "",
    metadata: Sequence[tuple[str, str]] = (),
    resumable: bool = False,
    timeout: float | None = None,
    on_progress: Callable[[Any], None] | None = None,
) -> Call:
    """Makes an AttachReceiverRequest of ReceiverArguments."""
    num_lanes = _num_lanes(lanes)
    request = wire.AttachReceiverRequest(
        request_id=request_id,
        receiver_key=receiver_key,
        receiver=receiver,
        num_tokens=num_tokens,
        layout=layout.to_wire(),
        num_lanes=num_lanes,
        model_fingerprint=model_fingerprint,
        resume_key=secrets.token_hex(16) if resumable else "",
    )
    return Call(request, tuple(metadata), timeout, on_progress, "AttachReceiver", num_tokens)


def _num_lanes(lanes: Lanes) -> int:
    """Returns the number, 0 for "auto"."""
    if lanes == "auto":
        return 0
    if isinstance(lanes, str) or not 1 <= lanes <= MAX_LANES:
        raise ValueError(f'lanes is {lanes}, allowed: "auto", 1 to {MAX_LANES}')
    return lanes


def generate_call(
    tokens: Sequence[int],
    max_new_tokens: int,
    attention: Attention = Attention(),
    sampling: Sampling = Sampling(),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    request_id: str = "",
    priority: int = 0,
    metadata: Sequence[tuple[str, str]] = (),
    timeout: float | None = None,
    on_progress: Callable[[Any], None] | None = None,
    pushed_transfer_id: str = "",
) -> Call:
    """Makes a GenerateRequest of GenerateArguments."""
    request = wire.GenerateRequest(
        request_id=request_id,
        token_ids=tokens,
        max_new_tokens=max_new_tokens,
        sampling=sampling.to_wire(),
        attention=attention.to_wire(),
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        priority=priority,
        pushed_transfer_id=pushed_transfer_id,
    )
    return Call(request, tuple(metadata), timeout, on_progress)
