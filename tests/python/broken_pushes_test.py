"""Tests that broken connections and damaged frames cost no prompt whose cache is pushed, with processes of this build.

    python3 tests/python/broken_pushes_test.py build/release/bin [--damaged_requests=1250]

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import random
import signal
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
from prefilld import (  # noqa: E402
    Attention,
    DecodeClient,
    Delivery,
    KvReceiver,
    Layout,
    PrefillClient,
    PrefilldError,
)
from prefilld.transfer import WholeCache  # noqa: E402
from unreliable_proxy import UnreliableProxy  # noqa: E402

PROMPT = [(i * i + 7) % 256 for i in range(1200)]
CUTS = 20
PATIENCE = 90
WISHED = {"layout": Layout(dtype="fp32"), "attention": Attention("dense"), "timeout": PATIENCE}


def eventually(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def store(cache):
    """Returns what a pushed cache brings, as one array."""
    whole = None
    for blocks in cache:
        whole = whole or WholeCache(cache.layout)
        whole.store(blocks)
    return whole.array


class BrokenPushes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.programs = cls.enterClassContext(live_processes.Programs())
        flags = (
            "--metrics_listen=127.0.0.1:0",
            "--frame_bytes=1048576",
            "--staging_bytes=16777216",
            "--deliver_to_allow=127.0.0.1:*",
        )
        cls.server = cls.programs.start(BIN_DIR / "prefilld", live_processes.MODEL, *flags)
        cls.client = cls.enterClassContext(PrefillClient(cls.server))
        with cls.client.prefill(PROMPT, **WISHED) as stream:
            cls.expected = stream.read_all()
            cls.first_token = stream.result.first_token.token_id
        cls.layers = len(cls.expected)

    def setUp(self):
        self.random = random.Random(self.id())
        self.names = ("steps_total", "resumed_streams_total", 'kv_frames_resent_total{cause="damaged"}')
        self.before = {name: self.metric(name) for name in self.names}

    def metric(self, name):
        return self.programs.metric(self.server, f"prefilld_{name}")

    def since(self, name):
        return self.metric(name) - self.before[name]

    def is_free(self):
        names = ("live_requests", "staged_bytes", "waiting_for_consumer", "queued_requests")
        return all(self.metric(name) == 0 for name in names)

    def cut(self, proxy, total_bytes):
        """Has the push cut at CUTS points, of which the last is before its end."""
        points = sorted(self.random.randrange(total_bytes) for _ in range(CUTS))
        proxy.cut_after(b - a for a, b in zip([0, *points], points))

    def push(self, client, address, tokens=PROMPT, transfer_id="t", **arguments):
        return client.submit(tokens, deliver_to=Delivery(address, transfer_id), **{**WISHED, **arguments})

    def receive_in_python(self, lanes):
        receiver = self.enterContext(KvReceiver())
        proxy = self.enterContext(UnreliableProxy(receiver.address, upwards=True))
        self.cut(proxy, int(0.7 * self.expected.nbytes))
        with receiver.expect("t", PROMPT, layout=WISHED["layout"], timeout=PATIENCE) as cache:
            pushed = self.push(self.client, proxy.address, lanes=lanes)
            np.testing.assert_array_equal(store(cache), self.expected)
            self.assertEqual(list(pushed), [])
        self.assertEqual(cache.result.first_token.token_id, self.first_token)
        self.assertEqual(len(pushed.result.frames_per_lane), lanes)
        self.expect_all_cut(proxy, lanes)

    def expect_all_cut(self, proxy, lanes):
        # A lane that has little left may not come to its cut.
        self.assertGreaterEqual(proxy.cuts, CUTS if lanes == 1 else CUTS - lanes)
        self.assertEqual(self.since("steps_total"), self.layers)
        self.assertGreater(self.since("resumed_streams_total"), 0)
        self.assertTrue(eventually(self.is_free))

    def test_the_python_receiver_gets_every_byte(self):
        self.receive_in_python(lanes=1)

    def test_the_python_receiver_gets_every_byte_on_four_lanes(self):
        self.receive_in_python(lanes=4)

    def start_worker(self, *flags):
        flags = ("--prefill_address=", "--kv_pool_tokens=8192", "--metrics_listen=", *flags)
        return self.programs.start(BIN_DIR / "prefilld-decode-worker", live_processes.MODEL, *flags)

    def generate(self, worker, address, lanes):
        """Returns the tokens of a worker that has its cache pushed to it by way of `address`, and the push's result."""
        with DecodeClient(worker) as decoder:
            with decoder.generate(PROMPT, 8, ignore_eos=True, pushed_transfer_id="t") as stream:
                stream.wait_started()
                pushed = self.push(self.client, address, layout=Layout(), lanes=lanes)
                tokens = [token.id for token in stream]
                self.assertEqual(list(pushed), [])
        return tokens, pushed.result

    def test_the_decode_worker_generates_what_it_would_have(self):
        worker = self.start_worker()
        undisturbed, result = self.generate(worker, worker, lanes="auto")
        self.assertEqual(undisturbed[0], self.first_token)
        for lanes in (1, 4):
            with self.subTest(lanes=lanes):
                self.setUp()
                proxy = self.enterContext(UnreliableProxy(worker, upwards=True))
                self.cut(proxy, int(0.7 * result.kv_bytes))
                tokens, disturbed = self.generate(worker, proxy.address, lanes)
                self.assertEqual(tokens, undisturbed)
                self.assertEqual(disturbed.kv_bytes, result.kv_bytes)
                self.expect_all_cut(proxy, lanes)

    def test_damaged_frames_come_again_and_no_others(self):
        """Short prompts have one frame a layer."""
        prompts = [[(i * j + i) % 256 for j in range(40)] for i in range(8)]
        expected = [self.client.prefill(prompt, **WISHED).read_all() for prompt in prompts]
        receiver = self.enterContext(KvReceiver())
        proxy = self.enterContext(UnreliableProxy(receiver.address, upwards=True))
        proxy.flip_every(100)

        def receive(i):
            with receiver.expect(str(i), prompts[i % 8], layout=WISHED["layout"], timeout=PATIENCE) as cache:
                pushed = self.push(self.client, proxy.address, prompts[i % 8], transfer_id=str(i))
                equal = np.array_equal(store(cache), expected[i % 8])
                self.assertEqual(list(pushed), [])
            return equal, pushed.result.kv_frames

        with ThreadPoolExecutor(4) as pool:
            received = list(pool.map(receive, range(DAMAGED_REQUESTS)))
        again = self.since('kv_frames_resent_total{cause="damaged"}')
        frames = sum(count for _, count in received)
        print(f"{frames} frames, {proxy.flips} damaged, {again:.0f} sent again")
        self.assertTrue(all(equal for equal, _ in received))
        self.assertGreaterEqual(proxy.flips, frames // 100)
        self.assertEqual(again, proxy.flips)
        self.assertEqual(self.since("resumed_streams_total"), 0)

    def test_a_worker_that_is_killed_and_started_anew_knows_nothing_of_the_push(self):
        worker = self.start_worker()
        process = self.programs.process_at(worker)
        failure = []

        def push_on():
            try:
                list(self.push(self.client, worker, PROMPT * 3, layout=Layout()))
            except PrefilldError as error:
                failure.append(error)

        with DecodeClient(worker) as decoder:
            stream = decoder.generate(PROMPT * 3, 8, pushed_transfer_id="t")
            stream.wait_started()
            pusher = threading.Thread(target=push_on)
            pusher.start()
            self.assertTrue(eventually(lambda: self.metric("staged_bytes") > 0))
            process.send_signal(signal.SIGKILL)
            process.wait()
            stream.close()
        self.start_worker(f"--listen={worker}")
        pusher.join(PATIENCE)
        self.assertEqual([error.code for error in failure], [grpc.StatusCode.NOT_FOUND])
        self.assertIn(worker, failure[0].details)
        self.assertTrue(eventually(self.is_free))


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1))
    DAMAGED_REQUESTS = 125
    if len(sys.argv) > 1 and sys.argv[1].startswith("--damaged_requests="):
        DAMAGED_REQUESTS = int(sys.argv.pop(1).partition("=")[2])
    unittest.main()
