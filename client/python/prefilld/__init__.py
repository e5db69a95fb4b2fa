"""Client of prefilld.

from prefilld import Attention, DecodeClient, Layout, PrefillClient

with PrefillClient("localhost:50051") as client:
    with client.prefill(tokens, layout=Layout(block_tokens=64)) as stream:
        for blocks in stream:  # verified; layer by layer, while later layers compute
            cache.store(blocks.layer, blocks.first_block, blocks.keys, blocks.values)
        print(stream.result.first_token.token_id, stream.result.total.density)

with DecodeClient("localhost:50052") as client:
    for token in client.generate(tokens, max_new_tokens=16, attention=Attention("share")):
        print(token.id)
"""

from prefilld.clients import DecodeClient, GenerateStream, PrefillClient, PrefillStream, Token, retry_after
from prefilld.options import Attention, Layout, Sampling
from prefilld.prefixes import prefix_keys
from prefilld.transfer import KvBlocks, TransferError, to_float32

__all__ = [
    "Attention",
    "DecodeClient",
    "GenerateStream",
    "KvBlocks",
    "Layout",
    "PrefillClient",
    "PrefillStream",
    "Sampling",
    "Token",
    "TransferError",
    "prefix_keys",
    "retry_after",
    "to_float32",
]
