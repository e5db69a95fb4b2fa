"""Tests several receivers of one computation with a prefilld of this build.

    python3 tests/python/several_receivers_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import secrets
import sys
import threading
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

import grpc  # noqa: E402
import numpy as np  # noqa: E402
from prefilld import AsyncPrefillClient, Attention, Layout, PrefillClient, PrefilldError  # noqa: E402

PROMPT = [(i * i + 7) % 256 for i in range(1500)]
PATIENCE = 60


class Ranks(unittest.TestCase):
    """The model has two KV heads: rank 0 takes the first, and rank 1 the second."""

    @classmethod
    def setUpClass(cls):
        cls.programs = cls.enterClassContext(live_processes.Programs())
        cls.address = cls.programs.start(BIN_DIR / "prefilld", live_processes.MODEL, "--metrics_listen=127.0.0.1:0")

    def metric(self, series):
        return self.programs.metric(self.address, series)

    def whole(self):
        with PrefillClient(self.address) as client:
            with client.prefill(PROMPT, layout=self.layout(num_heads=2), attention=Attention("dense")) as stream:
                return stream.read_all()

    def layout(self, **fields):
        return Layout(**{"block_tokens": 32, "dtype": "fp32", "num_heads": 1, **fields})

    def rank(self, client, rank, key, lanes=1, prompt=PROMPT):
        """Starts the call of one rank."""
        if rank == 0:
            return client.submit(
                prompt, request_id="ranks", receivers=2, receiver_key=key, lanes=lanes, layout=self.layout(),
                attention=Attention("dense"), timeout=PATIENCE,
            )  # fmt: skip
        layout = self.layout(first_head=1, order="hn2d")
        return client.attach_receiver("ranks", key, 1, len(prompt), lanes=lanes, layout=layout, timeout=PATIENCE)

    def test_each_take_their_heads_and_the_prompt_is_computed_once(self):
        expected = self.whole()
        for lanes in (1, 2):
            before = [self.metric(f"prefilld_{name}") for name in ("steps_total", "prompt_tokens_count")]
            caches, key = {}, secrets.token_hex(32)

            def receive(rank, lanes=lanes, key=key, caches=caches):
                with PrefillClient(self.address) as client, self.rank(client, rank, key, lanes) as stream:
                    caches[rank] = stream.read_all()
                    self.assertEqual(stream.result.num_tokens, len(PROMPT))
                    self.assertEqual(stream.result.kv_bytes, caches[rank].nbytes)

            ranks = [threading.Thread(target=receive, args=(rank,)) for rank in (1, 0)]  # the receiver comes first
            for thread in ranks:
                thread.start()
            for thread in ranks:
                thread.join(PATIENCE)
            np.testing.assert_array_equal(caches[0], expected[:, :, :, :, :1])
            np.testing.assert_array_equal(caches[1].swapaxes(3, 4), expected[:, :, :, :, 1:])
            after = [self.metric(f"prefilld_{name}") for name in ("steps_total", "prompt_tokens_count")]
            self.assertEqual([b - a for a, b in zip(before, after)], [len(expected), 1])

    def test_both_may_be_of_asyncio(self):
        async def receive():
            key = secrets.token_hex(32)
            async with AsyncPrefillClient(self.address) as client:
                async with self.rank(client, 0, key) as first, self.rank(client, 1, key) as second:
                    return await asyncio.gather(first.read_all(), second.read_all())

        expected = self.whole()
        first, second = asyncio.run(receive())
        np.testing.assert_array_equal(first, expected[:, :, :, :, :1])
        np.testing.assert_array_equal(second.swapaxes(3, 4), expected[:, :, :, :, 1:])

    def test_a_stranger_is_refused_and_the_first_call_ends_its_receivers(self):
        key, prompt = secrets.token_hex(32), PROMPT * 6
        # The first call takes nothing, and the whole cache is more than connections hold.
        with PrefillClient(self.address) as client, self.rank(client, 0, key, prompt=prompt) as first:
            first.wait_accepted()
            for wrong in ("", secrets.token_hex(32)):
                with self.rank(client, 1, wrong, prompt=prompt) as stranger, self.assertRaises(PrefilldError) as caught:
                    stranger.wait_accepted()
                self.assertEqual(caught.exception.code, grpc.StatusCode.PERMISSION_DENIED)
            with self.rank(client, 1, key, prompt=prompt) as second:
                second.wait_accepted()
                first.cancel()
                with self.assertRaises(PrefilldError) as caught:
                    second.read_all()
                self.assertEqual(caught.exception.code, grpc.StatusCode.ABORTED)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
