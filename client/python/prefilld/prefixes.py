"""The blocks of a server's prefix cache, for routers: their names, and a picture of which are there."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import xxhash

from prefilld import wire

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


class CachedBlocks:
    """The picture of one server's prefix cache that its updates make (WatchPrefixCache in prefill.proto).

    blocks: the CachedBlock message of each key. sequence: the number of the latest change that is in it.
    complete: whether the snapshot is over; until then, blocks are missing.
    """

    def __init__(self) -> None:
        self.blocks: dict[bytes, object] = {}
        self.sequence = 0
        self.complete = False

    def apply(self, update: Any) -> None:
        """Takes the next update of one call. A call that is made anew needs a new picture."""
        for change in update.changes:
            if change.HasField("stored"):
                self.blocks[change.stored.key] = change.stored
            else:
                self.blocks.pop(change.removed, None)
        self.sequence = update.sequence
        self.complete = not update.in_snapshot

    def cached_tokens(self, keys: Sequence[bytes], policy: str = "dense") -> int:
        """Returns how many tokens at the beginning of a prompt a request of this policy finds there.

        keys: prefix_keys() of the prompt. policy: the one that will run, so not "auto". Thresholds are taken to
        be those of the requests before, and --prefix_cache_reuse to be looser, which is its default.
        """
        serving = {wire.enum_value("AttentionPolicy", "dense"), wire.enum_value("AttentionPolicy", policy)}
        count = 0
        for key in keys:
            block = self.blocks.get(key)
            if block is None or block.policy not in serving:
                break
            count += BLOCK_TOKENS
        return count
