"""Tests the lanes of the Python KvReceiver, whose sender is the test.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import queue
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    from played_server import BLOCKS, LAYERS, PATIENCE, TOKENS, frame, layout
    from prefilld import KvReceiver, PrefilldError, pushed_lanes, wire
    from prefilld import receiver as receiving
    from unreliable_proxy import UnreliableProxy
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

KEY = "0123456789abcdef0123456789abcdef"


class PlayedLane:
    """One stream of a lane, whose sender is the test."""

    def __init__(self, channel, lane=0, num_lanes=1, key=KEY, transfer_id="t", **fields):
        self._out = queue.SimpleQueue()
        opening = wire.ReceiveOpen(
            transfer_id=transfer_id, layout=layout(**fields), lane=lane, num_lanes=num_lanes, transfer_key=key
        )
        self._out.put(wire.ReceiveRequest(open=opening))
        self._call = wire.Stub(channel, "KvReceiver").ReceiveLane(iter(self._out.get, None), timeout=PATIENCE)

    def send(self, sequence, layer, lane=0, damaged=False):
        message = frame(layer, lane, sequence).kv_frame
        message.checksum ^= damaged
        self._out.put(wire.ReceiveRequest(kv_frame=message))

    def send_result(self, *frames):
        self._out.put(wire.ReceiveRequest(result=wire.PrefillResult(frames_per_lane=frames, num_tokens=len(TOKENS))))

    def receipt(self):
        return next(self._call)

    def until(self, received):
        while self.receipt().received < received:
            pass

    def leave(self):
        self._call.cancel()
        self._out.put(None)

    def end(self):
        """Returns the status with which the receiver ends the stream."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass
        self._out.put(None)
        return self._call.code(), self._call.details()


class Lanes(unittest.TestCase):
    def setUp(self):
        self.receiver = self.enterContext(KvReceiver(resume_window=PATIENCE))
        self.channel = self.enterContext(grpc.insecure_channel(self.receiver.address))
        self.cache = self.enterContext(self.receiver.expect("t", TOKENS, timeout=PATIENCE))
        self.blocks = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        try:
            self.blocks.extend(self.cache)
        except PrefilldError as error:
            self.blocks.append(error)

    def expect_whole(self):
        self.reader.join(PATIENCE)
        self.assertEqual(sorted(b.layer for b in self.blocks), list(range(LAYERS)))

    def leave_unread(self):
        self.cache.close()
        self.reader.join(PATIENCE)

    def test_each_frame_is_acknowledged_and_the_result_completes_all(self):
        lanes = [PlayedLane(self.channel, lane, 2) for lane in (0, 1)]
        for layer in range(LAYERS):
            lanes[layer % 2].send(layer // 2, layer, lane=layer % 2)
        counts = [-(-LAYERS // 2), LAYERS // 2]
        for lane in (0, 1):
            lanes[lane].until(counts[lane])
        lanes[0].send_result(*counts)
        self.assertTrue(lanes[0].receipt().complete)
        self.assertEqual(lanes[0].end()[0], grpc.StatusCode.OK)
        lanes[1].leave()
        self.expect_whole()

    def test_a_stream_goes_on_where_the_one_before_broke(self):
        first = PlayedLane(self.channel)
        first.send(0, 0)
        first.send(1, 1)
        first.until(2)
        first.leave()
        second = PlayedLane(self.channel)
        self.assertEqual(second.receipt().received, 2)
        for layer in range(1, LAYERS):  # the first of these comes again
            second.send(layer, layer)
        second.until(LAYERS)
        second.send_result(LAYERS)
        self.assertTrue(second.receipt().complete)
        self.expect_whole()
        # The connection may break under that receipt, even when the id is expected again.
        for expected in (False, True):
            with self.subTest(expected=expected):
                if expected:
                    self.enterContext(self.receiver.expect("t", TOKENS))
                again = PlayedLane(self.channel).receipt()
                self.assertEqual((again.received, again.complete), (LAYERS, True))

    def bring(self, receiver, channel, transfer_id):
        with receiver.expect(transfer_id, TOKENS, timeout=PATIENCE) as cache:
            lane = PlayedLane(channel, transfer_id=transfer_id)
            for layer in range(LAYERS):
                lane.send(layer, layer)
            for _ in range(LAYERS):
                next(cache._items)
            lane.until(LAYERS)
            lane.send_result(LAYERS)
            self.assertEqual(list(cache), [])
            self.assertTrue(lane.receipt().complete)

    def wait_for_window(self, receiver, transfer_id):
        completed = receiver._complete[transfer_id, KEY][1]
        while time.monotonic() < completed + receiver._resume_window:
            time.sleep(0.01)

    def test_complete_caches_are_remembered_until_a_sender_knows_that_its_connection_is_dead(self):
        with KvReceiver(resume_window=0.2) as receiver, grpc.insecure_channel(receiver.address) as channel:
            self.bring(receiver, channel, "a")
            self.wait_for_window(receiver, "a")
            lane = PlayedLane(channel, transfer_id="a")
            self.assertTrue(lane.receipt().complete)
            lane.leave()
        self.leave_unread()

    def test_complete_caches_are_forgotten_once_no_sender_comes_back(self):
        with mock.patch.object(receiving, "_NOTICED_AFTER", 0.0):
            receiver = self.enterContext(KvReceiver(resume_window=0.2))
        channel = self.enterContext(grpc.insecure_channel(receiver.address))
        self.bring(receiver, channel, "a")
        self.wait_for_window(receiver, "a")
        self.bring(receiver, channel, "b")
        self.assertEqual([transfer_id for transfer_id, _ in receiver._complete], ["b"])
        self.wait_for_window(receiver, "b")
        self.assertEqual(PlayedLane(channel, transfer_id="b").end()[0], grpc.StatusCode.NOT_FOUND)
        self.assertEqual(receiver._complete, {})
        self.leave_unread()

    def test_lane_0_alone_says_that_a_transfer_is_complete(self):
        lanes = [PlayedLane(self.channel, lane, 2) for lane in (0, 1)]
        for layer in range(LAYERS):
            lanes[0].send(layer, layer)
        lanes[0].until(LAYERS)
        lanes[1].receipt()
        lanes[0].send_result(LAYERS, 0)
        self.assertTrue(lanes[0].receipt().complete)
        self.expect_whole()
        for lane in (0, 1):
            self.assertEqual(PlayedLane(self.channel, lane, 2).receipt().complete, lane == 0)

    def test_the_result_does_not_overtake_blocks_that_wait_for_the_consumer(self):
        put = self.cache._mailbox.put

        def put_late(entry):
            if getattr(entry, "layer", None) == LAYERS - 1:
                waiting.set()
                self.reader.join(0.5)  # time for the iteration to end without this layer, which it must not
            return put(entry)

        waiting = threading.Event()
        self.cache._mailbox.put = put_late
        first = PlayedLane(self.channel)
        for layer in range(LAYERS):
            first.send(layer, layer)
        self.assertTrue(waiting.wait(PATIENCE))
        first.leave()
        second = PlayedLane(self.channel)
        self.assertEqual(second.receipt().received, LAYERS)
        second.send_result(LAYERS)
        self.expect_whole()

    def test_lanes_are_taken_in_while_the_consumer_takes_nothing(self):
        cache = self.enterContext(self.receiver.expect("slow", TOKENS, timeout=PATIENCE))
        mailbox, put, waiting = cache._mailbox, cache._mailbox.put, threading.Event()

        def put_or_tell(entry):
            with mailbox._changed:
                if len(mailbox._entries) == mailbox._room:
                    waiting.set()
            return put(entry)

        mailbox.put = put_or_tell
        first = PlayedLane(self.channel, 0, 2, transfer_id="slow")
        for layer in range(LAYERS - 1):
            first.send(layer, layer)
        first.until(LAYERS - 2)
        self.assertTrue(waiting.wait(PATIENCE))
        # A sender that tries again and again gets its receipts, and what it sends waits in one thread alone.
        for _ in range(3):
            first.leave()
            first = PlayedLane(self.channel, 0, 2, transfer_id="slow")
            self.assertEqual(first.receipt().received, LAYERS - 1)
            first.send(LAYERS - 1, LAYERS - 1)
        second = PlayedLane(self.channel, 1, 2, transfer_id="slow")
        self.assertEqual(second.receipt().received, 0)
        self.assertEqual([len(mailbox._entries), cache._lanes._busy], [mailbox._room, {0}])
        blocks = [next(cache._items) for _ in range(LAYERS)]
        self.assertEqual(sorted(b.layer for b in blocks), list(range(LAYERS)))
        first.until(LAYERS)
        first.send_result(LAYERS, 0)
        self.assertEqual(list(cache), [])
        self.assertTrue(first.receipt().complete)
        second.leave()
        self.leave_unread()

    def test_the_threads_of_streams_that_lost_their_places_are_free(self):
        lanes, first, second = self.cache._lanes, mock.Mock(), mock.Mock()
        lanes.check, lanes._streams, lanes._timers, lanes._busy = mock.Mock(), [first], [None], {0}
        waits = (lanes.may_hand_on_result, lanes.await_end, lambda *place: lanes.take(mock.Mock(), *place, None))
        with ThreadPoolExecutor() as executor:
            ends = [executor.submit(wait, 0, first) for wait in waits]
            while len(lanes._changed._waiters) < len(waits):
                time.sleep(0.01)
            with lanes.lock:
                lanes.open(mock.Mock(lane=0, num_lanes=1), second)
            errors = [end.exception(PATIENCE) for end in ends]
        self.assertEqual([error.code for error in errors], [grpc.StatusCode.ABORTED] * len(waits))
        first.cancel.assert_called_once()
        self.leave_unread()

    def test_a_stream_takes_the_place_of_one_that_seems_alive_and_a_stranger_does_not(self):
        first = PlayedLane(self.channel)
        first.send(0, 0)
        first.until(1)
        self.assertEqual(PlayedLane(self.channel, key=KEY[::-1]).end()[0], grpc.StatusCode.PERMISSION_DENIED)
        self.assertEqual(PlayedLane(self.channel, key="short").end()[0], grpc.StatusCode.INVALID_ARGUMENT)
        self.assertEqual(PlayedLane(self.channel, key="k" * 129).end()[0], grpc.StatusCode.INVALID_ARGUMENT)
        self.assertEqual(PlayedLane(self.channel, num_lanes=3).end()[0], grpc.StatusCode.INVALID_ARGUMENT)
        second = PlayedLane(self.channel)
        self.assertEqual(second.receipt().received, 1)
        self.assertIn(first.end()[0], (grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED))
        for layer in range(1, LAYERS):
            second.send(layer, layer)
        second.until(LAYERS)
        second.send_result(LAYERS)
        self.assertTrue(second.receipt().complete)
        self.expect_whole()

    def test_a_damaged_frame_is_named_and_comes_again(self):
        lane = PlayedLane(self.channel)
        lane.receipt()
        lane.send(0, 0, damaged=True)
        named = lane.receipt()
        self.assertEqual((named.received, list(named.damaged)), (0, [0]))
        for layer in (*range(1, LAYERS), 0):
            lane.send(layer, layer)
        lane.until(LAYERS)
        lane.send_result(LAYERS)
        self.assertTrue(lane.receipt().complete)
        self.expect_whole()

    def test_no_more_damaged_frames_are_awaited_than_blocks_are_missing(self):
        lane = PlayedLane(self.channel)
        for sequence in range(LAYERS * BLOCKS + 1):
            lane.send(sequence, 0, damaged=True)
        code, details = lane.end()
        self.assertEqual(code, grpc.StatusCode.DATA_LOSS)
        self.assertIn(f"frame {LAYERS * BLOCKS} of", details)
        self.leave_unread()

    def test_an_opening_that_makes_no_sense_keeps_nobody_out(self):
        for lane, num_lanes in ((0, 0), (0, 17), (2, 2)):
            code, details = PlayedLane(self.channel, lane, num_lanes).end()
            self.assertEqual(code, grpc.StatusCode.INVALID_ARGUMENT)
            self.assertIn(f"num_lanes {'is ' * (lane > 0)}{num_lanes}", details)
        self.assertEqual(PlayedLane(self.channel).receipt().received, 0)
        self.leave_unread()

    def expect_failed(self, text):
        self.reader.join(PATIENCE)
        self.assertEqual([text in str(error) for error in self.blocks], [True], self.blocks)

    def test_a_layout_beyond_all_models_ends_the_transfer(self):
        code, details = PlayedLane(self.channel, num_layers=2**32 - 1).end()
        self.assertEqual(code, grpc.StatusCode.FAILED_PRECONDITION)
        self.assertIn("num_layers is 4294967295, allowed: 1 to 1024", details)
        self.expect_failed(details)

    def test_a_first_stream_that_cannot_be_taken_in_ends_the_transfer(self):
        with mock.patch.object(pushed_lanes, "TransferCheck", side_effect=MemoryError("no room")):
            self.assertIn("no room", PlayedLane(self.channel).end()[1])
        self.expect_failed("no room")
        self.assertTrue(self.cache._taken.acquire(blocking=False))

    def test_a_sender_that_stays_away_is_told_to_the_one_who_waits(self):
        with KvReceiver(resume_window=0.2) as receiver, grpc.insecure_channel(receiver.address) as channel:
            with receiver.expect("t", TOKENS, timeout=PATIENCE) as cache:
                lane = PlayedLane(channel)
                lane.send(0, 0)
                next(iter(cache))
                lane.leave()
                with self.assertRaisesRegex(PrefilldError, "did not come back") as caught:
                    list(cache)
        self.assertEqual(caught.exception.code, grpc.StatusCode.UNAVAILABLE)
        self.leave_unread()

    def test_a_sender_whose_machine_vanished_is_gone_too(self):
        hasty = (("grpc.keepalive_time_ms", 200), ("grpc.keepalive_timeout_ms", 3000))
        with mock.patch.object(receiving, "_KEEP_ALIVE", hasty):
            receiver = self.enterContext(KvReceiver(resume_window=2))
        proxy = self.enterContext(UnreliableProxy(receiver.address))
        channel = self.enterContext(grpc.insecure_channel(proxy.address))
        cache = self.enterContext(receiver.expect("vanished", TOKENS, timeout=PATIENCE))
        lane = PlayedLane(channel, transfer_id="vanished")
        lane.send(0, 0)
        with self.assertRaisesRegex(PrefilldError, "did not come back"):
            next(iter(cache))
            proxy.fall_silent()
            list(cache)
        lane.leave()
        self.leave_unread()

    def test_a_receiver_that_leaves_ends_every_lane(self):
        lanes = [PlayedLane(self.channel, lane, 2) for lane in (0, 1)]
        for lane in lanes:
            lane.receipt()
        self.cache.close()
        for lane in lanes:
            self.assertEqual(lane.end()[0], grpc.StatusCode.CANCELLED)
        self.reader.join(PATIENCE)


if __name__ == "__main__":
    unittest.main()
