"""The names under which a server's prefix cache knows the blocks of a prompt, for routers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash

BLOCK_TOKENS = 128


def prefix_keys(
    tokens: Sequence[int], model_fingerprint: str, *, salt: str = "", rope_tokens: int = 0
) -> list[bytes]:
    """Returns the 16-byte key of each whole block of 128 tokens, in the order of the prompt.

    A key is the XXH3-128 of the key before it and the block's token ids, unsigned, 32 bits,
    little-endian; so it names the block and everything before it. The key before the first is that of
    the text "prefilld-prefix 1\\n<model_fingerprint>\\n<rope_tokens>\\n<salt>".

    model_fingerprint: ServerInfo.model_fingerprint. salt: the cache_salt of the request; behind
    "<tenant>\\n" where the server tells tenants apart.
    rope_tokens: 0, except for models whose rotation changes with the prompt's length (rope_scaling
    "dynamic", prompts longer than the model's original positions): the number of tokens there.
    """
    key = xxhash.xxh3_128_digest(f"prefilld-prefix 1\n{model_fingerprint}\n{rope_tokens}\n{salt}".encode())
    keys = []
    for first in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = tokens[first : first + BLOCK_TOKENS]
        key = xxhash.xxh3_128_digest(key + struct.pack(f"<{BLOCK_TOKENS}I", *block))
        keys.append(key)
    return keys
