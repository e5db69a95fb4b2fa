"""Tests that the Python client follows the prefix cache of a real prefilld.

    python3 tests/python/watch_cache_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import random
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

import grpc  # noqa: E402
from prefilld import AsyncPrefillClient, Attention, CachedBlocks, Cancelled  # noqa: E402
from prefilld import Layout, PrefillClient, PrefilldError, prefix_keys  # noqa: E402

BLOCKS = 8  # that the cache holds
BLOCK_BYTES = 8 * 2 * 2 * 64 * 128 * 4  # layers, K and V, KV heads, head dimension, tokens, fp32
FLAGS = ("--metrics_listen=", f"--prefix_cache_bytes={BLOCKS * BLOCK_BYTES}", "--cache_watchers=all")


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=tokens)


class WatchPrefixCache(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.programs = cls.enterClassContext(live_processes.Programs())

    def start(self, *flags: str) -> PrefillClient:
        self.address = self.programs.start(BIN_DIR / "prefilld", live_processes.MODEL, *FLAGS, *flags)
        return self.enterContext(PrefillClient(self.address))

    def prefill(self, client: PrefillClient, tokens: list[int], policy: str = "dense", salt: str = ""):
        layout = Layout(first_block=len(tokens) // 16)
        with client.prefill(tokens, layout=layout, attention=Attention(policy), cache_salt=salt) as stream:
            list(stream)
        return stream.result

    def test_the_picture_is_what_the_server_has(self):
        client = self.start()
        info = client.server_info()
        self.assertEqual(info.prefix_cache.capacity_bytes, BLOCKS * BLOCK_BYTES)
        keys_of = lambda tokens, salt="": prefix_keys(tokens, info.model_fingerprint, salt=salt)  # noqa: E731
        first = prompt(1, 3 * 128 + 20)
        self.prefill(client, first)
        picture = CachedBlocks()
        with client.watch_prefix_cache(token_ids=True) as updates:
            for update in updates:
                picture.apply(update)
                self.assertIn(update.model_fingerprint, ("", info.model_fingerprint))
                if picture.complete:
                    break
            self.assertEqual(list(picture.blocks), keys_of(first))
            self.assertFalse(picture.blocks[keys_of(first)[0]].token_ids, "the operator did not allow tokens")

            # A prompt that begins with the same blocks finds them, and so the picture says.
            second = first[:256] + prompt(2, 200)
            self.assertEqual(picture.cached_tokens(keys_of(second)), 256)
            self.assertEqual(self.prefill(client, second).cached_tokens, 256)
            salted = prompt(3, 300)
            self.prefill(client, salted, salt="secret")
            while not set(keys_of(second)) | set(keys_of(salted, "secret")) <= set(picture.blocks):
                picture.apply(next(updates))
            self.assertEqual(picture.cached_tokens(keys_of(salted)), 0)

            # A prompt that fills the cache takes the place of all others.
            third = prompt(4, BLOCKS * 128 + 1)
            self.prefill(client, third)
            while picture.sequence < 6 + 6 + 8:
                picture.apply(next(updates))
            self.assertEqual(set(picture.blocks), set(keys_of(third)))
            self.assertEqual(client.server_info().prefix_cache.used_bytes, BLOCKS * BLOCK_BYTES)

    def test_kv_of_a_sparse_policy_serves_that_policy(self):
        client = self.start("--cache_watch_tokens")
        tokens = prompt(5, 5 * 128 + 1)
        self.prefill(client, tokens, policy="share")
        picture = CachedBlocks()
        with client.watch_prefix_cache(token_ids=True) as updates:
            while not picture.complete:
                picture.apply(next(updates))
        keys = prefix_keys(tokens, client.server_info().model_fingerprint)
        self.assertEqual(picture.cached_tokens(keys, "share"), 640)
        self.assertEqual(picture.cached_tokens(keys, "dense"), 0)
        self.assertEqual(self.prefill(client, tokens, policy="share").cached_tokens, 640)
        self.assertEqual(list(picture.blocks[keys[1]].token_ids), tokens[128:256])
        self.assertEqual(picture.blocks[keys[1]].parent, keys[0])

    def test_asyncio_follows_too(self):
        client = self.start()
        tokens = prompt(6, 129)
        (key,) = prefix_keys(tokens, client.server_info().model_fingerprint)

        async def follow() -> list[bytes]:
            picture = CachedBlocks()
            async with AsyncPrefillClient(self.address) as watcher, watcher.watch_prefix_cache() as updates:
                async for update in updates:
                    picture.apply(update)
                    if not picture.blocks:
                        await asyncio.to_thread(self.prefill, client, tokens)
                    else:
                        return list(picture.blocks)

        self.assertEqual(asyncio.run(asyncio.wait_for(follow(), 60)), [key])

    def test_a_caller_can_stop_to_follow(self):
        client = self.start()
        updates = client.watch_prefix_cache()
        next(updates)
        updates.cancel()
        with self.assertRaises(Cancelled):
            next(updates)

    def test_who_may_not_follow_is_told(self):
        address = self.programs.start(BIN_DIR / "prefilld", live_processes.MODEL, "--metrics_listen=")
        client = self.enterContext(PrefillClient(address))
        with self.assertRaisesRegex(PrefilldError, "lets nobody follow its prefix cache") as caught:
            next(client.watch_prefix_cache())
        self.assertEqual(caught.exception.code, grpc.StatusCode.PERMISSION_DENIED)

    def test_one_call_follows_one_server(self):
        with self.assertRaisesRegex(ValueError, "a client of 2 servers"):
            PrefillClient(["127.0.0.1:1", "127.0.0.1:2"]).watch_prefix_cache()


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
