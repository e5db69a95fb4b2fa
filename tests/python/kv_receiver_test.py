"""Tests the Python KvReceiver: a prefilld of this build pushes to it, and so does the test itself.

    python3 tests/python/kv_receiver_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages.
"""

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
from played_server import BLOCKS, LAYERS, PATIENCE, TOKENS, frame, layout  # noqa: E402
from prefilld import (  # noqa: E402
    Attention,
    Cancelled,
    Delivery,
    KvReceiver,
    Layout,
    PrefillClient,
    PrefilldError,
    Push,
    wire,
)
from prefilld.transfer import WholeCache  # noqa: E402

PROMPT = [256, *b"The old fisher carried a lantern to the harbour, and the harbour was quiet. " * 20]


class Pushed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        programs = cls.enterClassContext(live_processes.Programs())
        flags = ("--metrics_listen=", "--deliver_to_allow=127.0.0.1:*")
        cls.client = cls.enterClassContext(
            PrefillClient(programs.start(BIN_DIR / "prefilld", live_processes.MODEL, *flags))
        )

    def setUp(self):
        self.receiver = self.enterContext(KvReceiver())

    def push(self, transfer_id="t", **arguments):
        delivery = Delivery(self.receiver.address, transfer_id)
        return self.client.submit(PROMPT, deliver_to=delivery, attention=Attention("dense"), **arguments)

    def test_a_pushed_cache_is_the_one_that_comes_on_the_call(self):
        wished = Layout(block_tokens=32, order="hnd", first_head=1, num_heads=1, first_block=2)
        with self.client.prefill(PROMPT, layout=wished, attention=Attention("dense")) as stream:
            expected = stream.read_all()
        with self.receiver.expect("t", PROMPT, layout=wished, timeout=PATIENCE) as cache:
            pushed = self.push(layout=wished)
            whole = None
            for blocks in cache:
                whole = whole or WholeCache(cache.layout)
                whole.store(blocks)
            self.assertEqual(list(pushed), [])
        np.testing.assert_array_equal(whole.array, expected)
        self.assertEqual(cache.result.first_token.token_id, stream.result.first_token.token_id)
        self.assertEqual(pushed.result.kv_frames, cache.result.kv_frames)

    def test_several_receivers_take_their_heads_of_one_computation(self):
        wished = [Layout(block_tokens=32), Layout(block_tokens=32, num_heads=1), Layout(first_head=1, order="hn2d")]
        with self.client.prefill(PROMPT, layout=wished[0], attention=Attention("dense")) as stream:
            expected = stream.read_all()
        caches = [self.enterContext(self.receiver.expect(str(i), PROMPT, layout=wished[i])) for i in (1, 2)]
        pushes = [Push(self.receiver.address, str(i), wished[i]) for i in (1, 2)]
        pushed = self.client.submit(PROMPT, pushes=pushes, attention=Attention("dense"))
        wholes = [None, None]

        def store(i):
            for blocks in caches[i]:
                wholes[i] = wholes[i] or WholeCache(caches[i].layout)
                wholes[i].store(blocks)

        threads = [threading.Thread(target=store, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        self.assertEqual(list(pushed), [])
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual([push.code for push in pushed.result.pushes], [0, 0])
        np.testing.assert_array_equal(wholes[0].array, expected[..., :1, :])
        tokens = [a.reshape(len(a), 2, -1, *a.shape[4:]) for a in (wholes[1].array.swapaxes(3, 4), expected)]
        np.testing.assert_array_equal(tokens[0][:, :, : len(PROMPT)], tokens[1][:, :, : len(PROMPT), 1:])

    def test_each_order_brings_the_same_numbers(self):
        caches = {}
        for order in ("nhd", "hnd", "nh2d", "hn2d"):
            wished = Layout(block_tokens=32, order=order)
            with self.client.prefill(PROMPT, layout=wished, attention=Attention("dense")) as stream:
                caches[order] = stream.read_all()
        for order in ("hnd", "hn2d"):
            caches[order] = caches[order].swapaxes(3, 4)
        for order, cache in caches.items():
            np.testing.assert_array_equal(cache, caches["nhd"], order)

    def test_a_cache_that_nobody_expects_is_refused(self):
        with self.assertRaisesRegex(PrefilldError, "nobody waits for transfer_id 'other'") as caught:
            list(self.push("other"))
        self.assertEqual(caught.exception.code, grpc.StatusCode.NOT_FOUND)

    def test_another_layout_is_refused(self):
        with self.receiver.expect("t", PROMPT, layout=Layout(block_tokens=64)) as cache:
            pushed = self.push(layout=Layout(block_tokens=16))
            for side in (cache, pushed):
                with self.assertRaisesRegex(PrefilldError, "block_tokens") as caught:
                    list(side)
                self.assertEqual(caught.exception.code, grpc.StatusCode.FAILED_PRECONDITION)

    def test_a_receiver_that_leaves_ends_the_prefill(self):
        with self.receiver.expect("t", PROMPT) as cache:
            pushed = self.push()
            next(iter(cache))
        with self.assertRaises(PrefilldError) as caught:
            list(pushed)
        self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)  # CANCELLED, but not by the caller

    def test_an_id_is_free_again_at_the_end(self):
        for _ in range(2):
            with self.receiver.expect("t", PROMPT, timeout=PATIENCE) as cache:
                with self.assertRaisesRegex(ValueError, "already expected"):
                    self.receiver.expect("t", PROMPT)
                with self.push() as pushed:
                    self.assertTrue(list(cache))
                    list(pushed)

    def test_a_cache_that_does_not_come_times_out(self):
        with self.receiver.expect("t", PROMPT, timeout=0.2) as cache:
            with self.assertRaisesRegex(PrefilldError, "did not come in time") as caught:
                list(cache)
        self.assertEqual(caught.exception.code, grpc.StatusCode.DEADLINE_EXCEEDED)


class Played(unittest.TestCase):
    """The test is the sender: messages that prefilld would not send."""

    def setUp(self):
        self.receiver = self.enterContext(KvReceiver(open_timeout=PATIENCE))
        channel = self.enterContext(grpc.insecure_channel(self.receiver.address))
        self.send = wire.Stub(channel, "KvReceiver").Receive

    def open(self, transfer_id="t"):
        return wire.ReceiveRequest(open=wire.ReceiveOpen(transfer_id=transfer_id, layout=layout()))

    def frames(self, layers=range(LAYERS)):
        return [wire.ReceiveRequest(kv_frame=frame(layer, 0, i).kv_frame) for i, layer in enumerate(layers)]

    def result(self, frames=LAYERS):
        return wire.ReceiveRequest(result=wire.PrefillResult(frames_per_lane=[frames], num_tokens=len(TOKENS)))

    def both(self, messages, taken=lambda cache: list(cache)):
        """Returns the answer or the error, of the sender and of the one who waits."""
        with self.receiver.expect("t", TOKENS, timeout=PATIENCE) as cache:
            sent = self.send.future(iter(messages), timeout=PATIENCE)
            try:
                got = taken(cache)
            except PrefilldError as error:
                got = error
        try:
            return sent.result(), got
        except grpc.RpcError as error:
            return error, got

    def test_the_sender_is_told_once_all_is_taken(self):
        answer, blocks = self.both([self.open(), *self.frames(), self.result()])
        self.assertEqual((answer.kv_frames, answer.kv_bytes), (LAYERS, LAYERS * 2 * BLOCKS * 16 * 2 * 4 * 4))
        self.assertEqual([b.layer for b in blocks], list(range(LAYERS)))

    def test_broken_promises_are_data_loss_for_both(self):
        damaged = self.frames()
        damaged[3].kv_frame.checksum += 1
        for text, messages in (
            ("checksum", [self.open(), *damaged, self.result()]),
            ("never sent", [self.open(), *self.frames(range(LAYERS - 1)), self.result(LAYERS - 1)]),
            ("after the result", [self.open(), self.result(), *self.frames()]),
        ):
            error, got = self.both(messages)
            self.assertEqual((error.code(), got.code), (grpc.StatusCode.DATA_LOSS,) * 2, text)
            self.assertIn(text, error.details())
            self.assertIn(text, got.details)

    def test_a_stream_that_ends_before_its_result_is_unavailable_for_both(self):
        error, got = self.both([self.open(), *self.frames()])
        self.assertEqual((error.code(), got.code), (grpc.StatusCode.UNAVAILABLE,) * 2)
        self.assertIn("without a result", got.details)

    def test_a_stream_begins_with_its_transfer(self):
        for messages in (self.frames(), []):
            with self.assertRaises(grpc.RpcError) as caught:
                self.send(iter(messages), timeout=PATIENCE)
            self.assertEqual(caught.exception.code(), grpc.StatusCode.DATA_LOSS)
        receiver = self.enterContext(KvReceiver(open_timeout=0.2))
        with grpc.insecure_channel(receiver.address) as channel:
            waiting = threading.Event()
            with self.assertRaises(grpc.RpcError) as caught:
                wire.Stub(channel, "KvReceiver").Receive((waiting.wait() for _ in range(1)), timeout=PATIENCE)
            waiting.set()
            self.assertEqual(caught.exception.code(), grpc.StatusCode.CANCELLED)

    def test_a_cache_comes_on_one_stream(self):
        def taken(cache):
            first = next(iter(cache))
            with self.assertRaises(grpc.RpcError) as caught:
                self.send(iter([self.open()]), timeout=PATIENCE)
            self.assertIn("another stream", caught.exception.details())
            return [first, *cache]

        answer, blocks = self.both([self.open(), *self.frames(), self.result()], taken)
        self.assertEqual(len(blocks), LAYERS)

    def test_a_sender_that_goes_away_is_told_to_the_one_who_waits(self):
        silence = threading.Event()

        def messages():
            yield self.open()
            yield from self.frames()
            silence.wait(PATIENCE)

        with self.receiver.expect("t", TOKENS, timeout=PATIENCE) as cache:
            sent = self.send.future(messages())
            received = [next(iter(cache)) for _ in range(LAYERS)]
            sent.cancel()
            with self.assertRaisesRegex(PrefilldError, "the sender ended") as caught:
                list(cache)
        silence.set()
        self.assertEqual(len(received), LAYERS)
        self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)

    def test_closing_the_receiver_ends_all(self):
        with KvReceiver() as receiver:
            cache = receiver.expect("t", TOKENS)
            threading.Timer(0.3, receiver.close).start()
            with self.assertRaisesRegex(Cancelled, "closed"):
                list(cache)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
