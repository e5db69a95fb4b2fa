"""Tests that broken connections and damaged frames cost no prompt, with processes of this build.

    python3 tests/python/broken_connections_test.py build/release/bin [--damaged_requests=1250]

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

import grpc  # noqa: E402
import numpy as np  # noqa: E402
from prefilld import AsyncPrefillClient, Attention, DecodeClient, Layout, PrefillClient, PrefilldError  # noqa: E402
from unreliable_proxy import UnreliableProxy  # noqa: E402

PROMPT = [(i * i + 7) % 256 for i in range(1200)]
CUTS = 20
PATIENCE = 60
WINDOW = 2.0  # seconds, of the server whose consumers are killed
WISHED = {"layout": Layout(dtype="fp32"), "attention": Attention("dense"), "timeout": PATIENCE}


def eventually(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


class BrokenConnections(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.programs = cls.enterClassContext(live_processes.Programs())
        cls.server = cls.start_server()
        with PrefillClient(cls.server) as client, client.prefill(PROMPT, **WISHED) as stream:
            cls.expected = stream.read_all()
            cls.first_token = stream.result.first_token.token_id
        cls.layers = len(cls.expected)

    @classmethod
    def start_server(cls, *flags):
        # One frame a 128 blocks and little staging memory, so that a stream has many frames. All of them go
        # through the proxy, and none around it in shared memory.
        frames = ("--frame_bytes=1048576", "--staging_bytes=16777216", "--shared_memory_bytes=0")
        flags = ("--metrics_listen=127.0.0.1:0", *frames, *flags)
        return cls.programs.start(BIN_DIR / "prefilld", live_processes.MODEL, *flags)

    def setUp(self):
        self.proxy = self.enterContext(UnreliableProxy(self.server))
        self.random = random.Random(self.id())
        self.before = {name: self.metric(name) for name in ("steps_total", "resumed_streams_total")}

    def metric(self, name, server=None):
        return self.programs.metric(server or self.server, f"prefilld_{name}")

    def since(self, name):
        return self.metric(name) - self.before[name]

    def cut(self, total_bytes):
        """Has the stream cut at CUTS points, of which the last is before its end."""
        points = sorted(self.random.randrange(total_bytes) for _ in range(CUTS))
        self.proxy.cut_after(b - a for a, b in zip([0, *points], points))

    def expect_all_cut(self, prompts=1):
        self.assertEqual(self.proxy.cuts, CUTS)
        self.assertEqual(self.since("steps_total"), prompts * self.layers)
        self.assertGreater(self.since("resumed_streams_total"), 0)
        self.assertTrue(eventually(lambda: self.is_free(self.server)))

    def is_free(self, server):
        names = ("live_requests", "staged_bytes", "waiting_for_consumer", "queued_requests")
        return all(self.metric(name, server) == 0 for name in names)

    def receive_blocking(self, lanes):
        self.cut(int(0.8 * self.expected.nbytes))
        with PrefillClient(self.proxy.address) as client:
            with client.prefill(PROMPT, lanes=lanes, resumable=True, **WISHED) as stream:
                np.testing.assert_array_equal(stream.read_all(), self.expected)
        self.expect_all_cut()

    def test_the_blocking_client_gets_every_byte(self):
        self.receive_blocking(lanes=1)

    def test_the_blocking_client_gets_every_byte_on_three_lanes(self):
        self.receive_blocking(lanes=3)

    def test_the_client_of_asyncio_gets_every_byte(self):
        async def receive():
            async with AsyncPrefillClient(self.proxy.address) as client:
                async with client.submit(PROMPT, lanes=2, resumable=True, **WISHED) as stream:
                    return await stream.read_all()

        self.cut(int(0.8 * self.expected.nbytes))
        np.testing.assert_array_equal(asyncio.run(receive()), self.expected)
        self.expect_all_cut()

    def test_prefill_cli_gets_every_byte(self):
        self.cut(int(0.8 * self.expected.nbytes))
        command = [
            BIN_DIR / "prefill-cli", "prefill", f"--server={self.proxy.address}", "--json", "--quiet",
            "--kv_dtype=fp32", "--policy=dense", f"--token_ids={','.join(map(str, PROMPT))}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(str(self.expected.nbytes), done.stdout)
        json.loads(done.stdout)
        self.expect_all_cut()

    def test_the_decode_worker_generates_what_it_would_have(self):
        flags = (f"--prefill_address={self.proxy.address}", "--kv_pool_tokens=8192")
        worker = self.programs.start(BIN_DIR / "prefilld-decode-worker", live_processes.MODEL, *flags)

        def generate():
            with DecodeClient(worker) as client:
                with client.generate(PROMPT, 8, attention=Attention("dense"), ignore_eos=True) as stream:
                    return [token.id for token in stream]

        undisturbed = generate()
        self.proxy.cut_all()
        self.cut(self.expected.nbytes // 4)  # in the decoder's own dtype it is half
        self.assertEqual(generate(), undisturbed)
        self.assertEqual(undisturbed[0], self.first_token)
        self.expect_all_cut(prompts=2)

    def test_damaged_frames_come_again_and_no_others(self):
        """Short prompts have one frame a layer."""
        prompts = [[(i * j + i) % 256 for j in range(40)] for i in range(8)]
        wished = {"layout": Layout(dtype="fp32"), "attention": Attention("dense"), "timeout": PATIENCE}
        with PrefillClient(self.server) as client:
            expected = [client.prefill(prompt, **wished).read_all() for prompt in prompts]
        frames_before = self.programs.metric(self.server, 'prefilld_kv_frames_resent_total{cause="damaged"}')
        self.proxy.flip_every(100)
        with PrefillClient(self.proxy.address) as client:

            def receive(i):
                with client.prefill(prompts[i % 8], resumable=True, **wished) as stream:
                    return np.array_equal(stream.read_all(), expected[i % 8]), stream.result.kv_frames

            with ThreadPoolExecutor(4) as pool:
                received = list(pool.map(receive, range(DAMAGED_REQUESTS)))
        again = self.programs.metric(self.server, 'prefilld_kv_frames_resent_total{cause="damaged"}') - frames_before
        frames = sum(count for _, count in received)
        print(f"{frames} frames, {self.proxy.flips} damaged, {again:.0f} sent again")
        self.assertTrue(all(equal for equal, _ in received))
        self.assertGreaterEqual(self.proxy.flips, frames // 100)
        self.assertEqual(again, self.proxy.flips)
        self.assertEqual(self.since("resumed_streams_total"), 0)

    def test_what_a_killed_consumer_held_comes_back_after_the_window(self):
        for window in (WINDOW, 0.0):
            with self.subTest(window=window):
                server = self.start_server(f"--resume_window_s={window}")
                process = self.programs.process_at(server)
                with PrefillClient(server) as client:
                    client.prefill(PROMPT[:100], **WISHED).read_all()
                self.assertTrue(eventually(lambda: self.is_free(server)))
                descriptors = Path(f"/proc/{process.pid}/fd")
                before = len(list(descriptors.iterdir()))
                consumer = subprocess.Popen([sys.executable, __file__, "--consume", server])
                self.assertTrue(eventually(lambda: self.metric("staged_bytes", server) > 0))
                consumer.send_signal(signal.SIGKILL)
                consumer.wait()
                killed_at = time.monotonic()
                self.assertTrue(eventually(lambda: self.is_free(server)))
                took = time.monotonic() - killed_at
                self.assertGreaterEqual(took, window / 2)
                self.assertTrue(eventually(lambda: len(list(descriptors.iterdir())) <= before))
                outcome = "not_resumed" if window else "cancelled"
                ended = self.programs.metric(server, f'prefilld_requests_total{{outcome="{outcome}"}}')
                self.assertEqual(ended, 1)

    def test_a_cancel_is_heard_at_once_and_a_killed_server_ends_the_stream(self):
        server = self.start_server("--resume_window_s=8")
        with PrefillClient(server) as client:
            stream = client.submit(PROMPT * 2, resumable=True, **WISHED)
            next(iter(stream))
            stream.close()
            self.assertTrue(eventually(lambda: self.is_free(server), seconds=6))
            self.assertEqual(self.programs.metric(server, 'prefilld_requests_total{outcome="cancelled"}'), 1)
            stream = client.submit(PROMPT * 2, resumable=True, **WISHED)
            next(iter(stream))
            self.programs.process_at(server).send_signal(signal.SIGKILL)
            with self.assertRaises(PrefilldError) as caught:
                stream.read_all()
            self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)
        self.assertTrue(eventually(lambda: threading.active_count() < 20))


def consume(server):
    """Takes one frame of a prompt and then nothing, until somebody kills this process."""
    with PrefillClient(server) as client:
        for _ in client.prefill(PROMPT * 2, resumable=True, **WISHED):
            time.sleep(PATIENCE)


if __name__ == "__main__":
    if sys.argv[1] == "--consume":
        consume(sys.argv[2])
        sys.exit()
    BIN_DIR = Path(sys.argv.pop(1))
    DAMAGED_REQUESTS = 125
    if len(sys.argv) > 1 and sys.argv[1].startswith("--damaged_requests="):
        DAMAGED_REQUESTS = int(sys.argv.pop(1).partition("=")[2])
    unittest.main()
