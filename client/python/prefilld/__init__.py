"""Client of prefilld.

from prefilld import Attention, DecodeClient, Layout, PrefillClient

with PrefillClient("localhost:50051") as client:
    with client.prefill(tokens, layout=Layout(block_tokens=64), lanes=4) as stream:
        for blocks in stream:  # verified; layer by layer, while later layers compute
            cache.store(blocks.layer, blocks.first_block, blocks.keys, blocks.values)
        print(stream.result.first_token.token_id, stream.result.total.density)

with DecodeClient("localhost:50052") as client:
    for token in client.generate(tokens, max_new_tokens=16, attention=Attention("share")):
        print(token.id)

AsyncPrefillClient and AsyncDecodeClient are the same for asyncio. prefilld.transformers fills the cache of a
Hugging Face model, and prefilld.vllm is a KV connector of vLLM.
"""

from prefilld.aio import AsyncCacheUpdates, AsyncDecodeClient, AsyncGenerateStream, AsyncPrefillClient, AsyncPrefillStream
from prefilld.arrays import to_float32, to_torch
from prefilld.clients import CacheUpdates, DecodeClient, GenerateStream, PrefillClient, PrefillStream
from prefilld.errors import Cancelled, PrefilldError, TransferError
from prefilld.options import (
    Attention,
    Delivery,
    GenerateArguments,
    Layout,
    PrefillArguments,
    Push,
    ReceiverArguments,
    Sampling,
)
from prefilld.prefixes import CachedBlocks, prefix_keys
from prefilld.receiver import ExpectedCache, KvReceiver
from prefilld.tokens import Token
from prefilld.transfer import KvBlocks

__all__ = [
    "AsyncCacheUpdates",
    "AsyncDecodeClient",
    "AsyncGenerateStream",
    "AsyncPrefillClient",
    "AsyncPrefillStream",
    "Attention",
    "CacheUpdates",
    "CachedBlocks",
    "Cancelled",
    "DecodeClient",
    "Delivery",
    "ExpectedCache",
    "GenerateArguments",
    "GenerateStream",
    "KvBlocks",
    "KvReceiver",
    "Layout",
    "PrefillArguments",
    "PrefillClient",
    "PrefillStream",
    "PrefilldError",
    "Push",
    "ReceiverArguments",
    "Sampling",
    "Token",
    "TransferError",
    "prefix_keys",
    "to_float32",
    "to_torch",
]
