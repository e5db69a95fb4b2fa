"""Fills the cache of a Hugging Face transformers model from prefilld, so that generate() goes on from there.

    from prefilld import PrefillClient
    from prefilld.transformers import prefill_cache

    with PrefillClient("localhost:50051") as client:
        cache = prefill_cache(client, model, **inputs)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)

The server must run the same weights. The cache holds all tokens of the prompt but the last, which generate()
computes: so every option of generate() holds from the first new token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from prefilld.clients import PrefillClient
from prefilld.options import Layout, PrefillArguments
from prefilld.transfer import KvBlocks

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel
    from typing_extensions import Unpack

_WIRE_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def prefill_cache(
    client: PrefillClient,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **arguments: Unpack[PrefillArguments],
) -> DynamicCache:
    """Returns a cache of input_ids[:, :-1], in the model's dtype and on the devices of its layers.

    input_ids: [batch, tokens]; attention_mask, of the same shape, is 0 where a shorter prompt is padded, on the
    left. arguments: those of PrefillClient.prefill. Each prompt is prefilled by a call of its own. The layout is
    chosen here unless it is named, which then has order "nhd" and all heads and blocks: dtype "fp8_e4m3" sends a
    quarter of the bytes of float32, and half of bfloat16's, and becomes the model's dtype here.
    Each byte of the cache is copied once, from the received message into the cache.

    Raises PrefilldError as PrefillClient.prefill does; ValueError when the server's model has other layers than
    this one, when the model keeps another kind of cache, when the layout cannot be filled, or when model.to(dtype) has
    rounded its RoPE frequencies.
    """
    from transformers import DynamicCache

    rows = _rows(input_ids, attention_mask)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"the model has layers of kind {', '.join(sorted(kinds))}; only full_attention can be filled")
    if model.dtype not in _WIRE_DTYPES:
        raise ValueError(f"the model computes in {model.dtype}; one of {', '.join(map(str, _WIRE_DTYPES))} can be filled")
    for name, buffer in model.get_decoder().named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            # Its queries would be rotated otherwise than the keys, the more so the longer the prompt.
            raise ValueError(
                f"the model's RoPE frequencies are {buffer.dtype}, rounded by model.to(dtype); "
                "load it with from_pretrained(..., dtype=...)"
            )
    layout = arguments.pop("layout", None) or Layout(block_tokens=128, dtype=_WIRE_DTYPES[model.dtype])
    if (layout.order, layout.first_head, layout.num_heads, layout.first_block) != ("nhd", 0, 0, 0):
        raise ValueError(f"{layout}: only order nhd with all heads and blocks can be filled")
    width = input_ids.shape[1] - 1  # positions that are filled
    devices = _devices(model)
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row, tokens in enumerate(rows):
        with client.prefill(tokens, layout=layout, **arguments) as stream:
            _check_shape(config, stream.layout)
            if not layers:
                shape = (len(rows), stream.layout.num_heads, width, stream.layout.head_dim)
                layers = [tuple(torch.zeros(shape, dtype=model.dtype, device=d) for _ in "kv") for d in devices]
            for blocks in stream:
                for place, received in zip(layers[blocks.layer], _received(blocks), strict=True):
                    # Received are [blocks, block_tokens, heads, head_dim]; the last block ends with zeros.
                    by_token = received.flatten(0, 1)
                    begin = blocks.first_block * layout.block_tokens
                    by_token = by_token[: max(0, len(tokens) - 1 - begin)]
                    begin += width + 1 - len(tokens)  # the padding
                    place[row].transpose(0, 1)[begin : begin + len(by_token)].copy_(by_token)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(layers):
        cache.update(keys, values, layer)
    return cache


def _received(blocks: KvBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values as numbers that a cache can take."""
    if blocks.key_scales is None:
        return blocks.torch()
    keys, values = blocks.float32()
    return torch.from_numpy(keys), torch.from_numpy(values)


def _rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[Sequence[int]]:
    """Returns the prompts without their padding."""
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids has the shape {tuple(input_ids.shape)}; [batch, 2 tokens or more] can be filled")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has the shape {tuple(attention_mask.shape)}, not {tuple(input_ids.shape)}")
    mask = attention_mask.bool()
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask: prompts must be padded on the left, and only there")
    return [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]


def _devices(model: PreTrainedModel) -> list[torch.device]:
    """Returns where each layer computes."""
    return [next(layer.parameters()).device for layer in model.get_decoder().layers]


def _check_shape(config, layout) -> None:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, theirs, ours in (
        ("layers", layout.num_layers, config.num_hidden_layers),
        ("KV heads", layout.num_heads, heads),
        ("elements in a head", layout.head_dim, head_dim),
    ):
        if theirs != ours:
            raise ValueError(f"the server's model has {theirs} {name}, this one {ours}: is it another model?")
