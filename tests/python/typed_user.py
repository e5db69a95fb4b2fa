"""A program as a user would write it, for typed_package_test.py: mypy --strict must find nothing in it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from prefilld import (
    AsyncDecodeClient,
    AsyncPrefillClient,
    Attention,
    CachedBlocks,
    Delivery,
    DecodeClient,
    KvBlocks,
    Layout,
    PrefillClient,
    PrefilldError,
    Sampling,
    prefix_keys,
)


def store(blocks: KvBlocks) -> int:
    shape: tuple[int, ...] = blocks.keys.shape
    return blocks.layer + blocks.first_block + shape[0] + len(blocks.values)


def blocking(tokens: Sequence[int]) -> float | None:
    try:
        with PrefillClient(["a:1", "b:1"]) as client:
            with client.prefill(tokens, layout=Layout(block_tokens=64), attention=Attention("share"), lanes=2) as stream:
                for blocks in stream:
                    store(blocks)
                name: str = stream.request_id
                print(name, stream.queue_position, stream.result.first_token.token_id)
            with client.submit(tokens, request_id="7", receivers=2, receiver_key=secrets.token_hex(32)) as first:
                first.wait_accepted()
                first.cancel()
            whole = client.attach_receiver("7", "k" * 32, 1, len(tokens), timeout=5).read_all()
            print(len(whole), client.server_info().model_fingerprint)
        return None
    except PrefilldError as error:
        print(error.code, error.details, error.advice, error.retryable)
        return error.retry_after


def generating(tokens: Sequence[int]) -> list[int]:
    with DecodeClient("w:1") as client, client.generate(tokens, 5, sampling=Sampling(temperature=0.5)) as answer:
        return [token.id for token in answer]


def following(tokens: Sequence[int]) -> int:
    picture = CachedBlocks()
    with PrefillClient("a:1") as client, client.watch_prefix_cache() as updates:
        for update in updates:
            picture.apply(update)
            if picture.complete:
                break
    return picture.cached_tokens(prefix_keys(tokens, "fingerprint", salt="s"), policy="dense")


async def at_once(tokens: Sequence[int]) -> int:
    count = 0
    async with AsyncPrefillClient("a:1") as client, AsyncDecodeClient("w:1") as worker:
        async with client.submit(tokens, lanes=4) as stream:
            await stream.wait_accepted()
            async for blocks in stream:
                count += store(blocks)
        async with worker.generate(tokens, 8, pushed_transfer_id="t") as answer:
            started = await answer.wait_started()
            layout = Layout.from_wire(started.kv_layout)
            async with client.submit(tokens, layout=layout, deliver_to=Delivery("w:1", "t")) as push:
                await push.wait_accepted()
            async for token in answer:
                count += token.id
    return count


if __name__ == "__main__":
    blocking([1, 2])
    asyncio.run(at_once([1, 2]))
