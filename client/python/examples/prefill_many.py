#!/usr/bin/env python3
"""Has many prompts prefilled at once, with asyncio: so many under way at a time, each tried again when it is refused.

    PYTHONPATH=client/python python3 client/python/examples/prefill_many.py --servers localhost:50051 --prompts 20

The prompts are random tokens. Several servers take them in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from prefilld import AsyncPrefillClient, Layout, PrefilldError


async def prefill(client: AsyncPrefillClient, tokens: list[int], tries: int) -> int:
    """Returns the bytes of one prompt's KV. Raises PrefilldError when the last try fails too."""
    while True:
        tries -= 1
        try:
            count = 0
            async with client.submit(tokens, layout=Layout(block_tokens=64)) as stream:
                async for blocks in stream:  # layer by layer, while later layers compute
                    count += blocks.keys.nbytes + blocks.values.nbytes
            return count
        except PrefilldError as error:  # nothing that came before it may be used
            if not error.retryable or not tries:
                raise
            await asyncio.sleep(error.retry_after or 0.5)


async def run(servers: list[str], prompts: list[list[int]], at_once: int, tries: int) -> None:
    places = asyncio.Semaphore(at_once)
    begin = time.monotonic()

    async def one(number: int, tokens: list[int]) -> None:
        async with places:
            try:
                count = await prefill(client, tokens, tries)
                print(f"{time.monotonic() - begin:6.2f} s  prompt {number}: {len(tokens)} tokens, {count} bytes of KV")
            except PrefilldError as error:
                print(f"{time.monotonic() - begin:6.2f} s  prompt {number} failed: {error}; {error.advice}")

    async with AsyncPrefillClient(servers) as client:
        await asyncio.gather(*(one(number, tokens) for number, tokens in enumerate(prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill many prompts at once.")
    parser.add_argument("--servers", nargs="+", default=["localhost:50051"], help="host:port of each prefilld")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=500, help="of each prompt")
    parser.add_argument("--at_once", type=int, default=8)
    parser.add_argument("--tries", type=int, default=5)
    args = parser.parse_args()
    prompts = [[random.randrange(256) for _ in range(args.tokens)] for _ in range(args.prompts)]
    asyncio.run(run(args.servers, prompts, args.at_once, args.tries))


if __name__ == "__main__":
    main()
