"""Finds out in which order a block of vLLM's cache is kept. Nothing here needs vLLM.

The shape of a cache does not tell: a backend may hide another order behind it. So the backend writes one block, and
what it wrote is compared with the orders that prefilld can send.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger("vllm.prefilld")


def rows_of(cache: torch.Tensor) -> torch.Tensor:
    """Returns [blocks, elements of a block]: the memory of a cache whose outermost axis counts blocks."""
    return cache.as_strided((cache.shape[0], cache.stride(0)), (cache.stride(0), 1))


def interleaved_order(
    cache: torch.Tensor, block_tokens: int, num_heads: int, head_dim: int, update: Callable
) -> str | None:
    """Returns "nh2d" or "hn2d" if K and V lie in one block in this order, and None for any other.

    update: update(keys, values, cache, slots), with which the backend writes [tokens, num_heads, head_dim].
    """
    if (
        cache.dim() != 4
        or sorted(cache.shape[1:3]) != sorted((block_tokens, num_heads))
        or cache.shape[3] != 2 * head_dim
        or cache.stride(0) != cache[0].numel()
    ):
        return None
    memory = torch.zeros(cache.stride(0), dtype=cache.dtype, device=cache.device)
    block = memory.as_strided((1, *cache.shape[1:]), cache.stride())
    random = torch.Generator().manual_seed(1)
    keys, values = (
        torch.randn(block_tokens, num_heads, head_dim, generator=random).to(cache.device, cache.dtype) for _ in range(2)
    )
    try:
        update(keys, values, block, torch.arange(block_tokens, device=cache.device))
    except Exception as error:  # this must not end the engine: it goes without
        logger.info("prefilld: the attention backend writes no single block: %r", error)
        return None
    by_token = torch.stack([keys, values], 2)  # [block_tokens, num_heads, 2, head_dim]
    for order, wanted in (("nh2d", by_token), ("hn2d", by_token.transpose(0, 1))):
        if torch.equal(memory, wanted.flatten()):
            return order
    return None
