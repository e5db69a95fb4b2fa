"""Tests the streams of the Python client, blocking and for asyncio, beside a server that the test plays.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import contextlib
import pickle
import sys
import threading
import time
import unittest
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    import numpy as np
    from played_server import BLOCKS, LAYERS, PATIENCE, TOKENS, PlayedServer, frame, layout, refusing, silent, whole
    from prefilld import (
        AsyncPrefillClient,
        Cancelled,
        Delivery,
        Layout,
        PrefillClient,
        PrefilldError,
        TransferError,
        wire,
    )
    from prefilld.frames import Frame, read_event
    from prefilld.transfer import Damaged, TransferCheck, WholeCache
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class Streams:
    """Tests of both clients. receive() reads a whole call; cancelled() one that is cancelled as it waits to be accepted."""

    def test_a_call_is_read_to_its_end(self):
        seen = []
        with PlayedServer(whole) as server:
            blocks, stream = self.receive(server.address, on_progress=seen.append, priority=3)
        self.assertEqual([b.layer for b in blocks], list(range(LAYERS)))
        self.assertEqual((blocks[1].keys.flat[0], blocks[1].keys.shape), (1000, (BLOCKS, 16, 2, 4)))
        self.assertEqual((stream.request_id, stream.priority, len(seen)), ("a", 2, 1))
        self.assertEqual(stream.result.num_tokens, len(TOKENS))

    def test_each_lane_has_a_connection_of_its_own(self):
        with PlayedServer(whole, lanes=3) as server:
            blocks, _ = self.receive(server.address, lanes=3)
            self.assertEqual(server.requests[0].num_lanes, 3)
            self.assertEqual(sorted(server.attached), [(1, "k", 0), (2, "k", 0)])
            self.assertEqual(len(server.peers), 3)
        self.assertEqual(sorted(b.layer for b in blocks), list(range(LAYERS)))

    def test_a_receiver_attaches_with_a_layout_and_lanes_of_its_own(self):
        with PlayedServer(whole, lanes=2) as server:
            blocks, stream = self.attached(server.address, 3, lanes=2, model_fingerprint="")
            (sent,) = server.requests
            self.assertEqual(server.attached, [(1, "k", 3)])
        self.assertIsInstance(sent, wire.AttachReceiverRequest)
        self.assertEqual((sent.request_id, sent.receiver_key, sent.receiver), ("a", "secret", 3))
        self.assertEqual((sent.num_tokens, sent.num_lanes), (len(TOKENS), 2))
        self.assertEqual(sorted(b.layer for b in blocks), list(range(LAYERS)))
        self.assertEqual(stream.result.num_tokens, len(TOKENS))

    def test_a_receiver_compares_the_layout_with_its_own_wish(self):
        with PlayedServer(whole) as server:
            for changes in (dict(layout=Layout(first_head=1)), dict(num_tokens=41)):
                with self.assertRaises(TransferError) as caught:
                    self.attached(server.address, 1, **changes)
                self.assertEqual(caught.exception.code.name, "FAILED_PRECONDITION")

    def test_a_receiver_does_not_guess_the_server(self):
        for address in (["127.0.0.1:1", "127.0.0.1:2"], "ipv4:127.0.0.1:1,127.0.0.1:2"):
            with self.assertRaisesRegex(ValueError, "the one server that has the request"):
                self.attached(address, 1)

    def test_receivers_are_announced(self):
        with PlayedServer(whole) as server:
            _, stream = self.receive(server.address, receivers=2, receiver_key="secret", request_id="a")
            self.assertEqual((server.requests[0].num_receivers, server.requests[0].receiver_key), (2, "secret"))
        self.assertEqual(stream.receiver_key, "secret")

    def test_a_frame_lost_on_a_further_lane_is_seen(self):
        with PlayedServer(whole, lanes=2) as server:
            server.layers_of = lambda lane: range(lane, LAYERS - (lane == 1 and bool(server.attached)), 2)
            server.result = lambda: wire.PrefillEvent(result=wire.PrefillResult(frames_per_lane=[3, 3]))
            self.fails("DATA_LOSS", "5 frames arrived of 6", server.address, lanes=2)

    def test_damage_on_a_further_lane_ends_the_call(self):
        def script(server, context):
            yield server.accepted()
            yield from silent(server, context)

        with PlayedServer(script, lanes=2) as server:
            server.frames = lambda lane: [frame(1, lane, checksum=7)]
            self.fails("DATA_LOSS", "checksum", server.address, lanes=2)
            self.assertTrue(server.ended.acquire(timeout=PATIENCE))

    def test_events_out_of_order_are_refused(self):
        for text, events in (
            ("begin with Accepted", lambda s: [s.result()]),
            ("before Accepted", lambda s: [frame(0)]),
            ("without a result", lambda s: [s.accepted(), *s.frames(0)]),
            ("Accepted came twice", lambda s: [s.accepted(), s.accepted()]),
            ("after the result", lambda s: [s.accepted(), *s.frames(0), s.result(), s.result()]),
            ("begin with Accepted", lambda s: []),
        ):
            with PlayedServer(lambda server, _, events=events: iter(events(server))) as server:
                self.fails("DATA_LOSS", text, server.address)

    def test_a_layout_that_was_not_asked_for_is_refused(self):
        with PlayedServer(lambda server, _: iter([server.accepted(block_tokens=32)])) as server:
            error = self.fails("FAILED_PRECONDITION", "block_tokens", server.address)
            self.assertIsInstance(error, TransferError)
        with PlayedServer(lambda server, _: iter([server.accepted(order=wire.enum_value("KvOrder", "hnd"))])) as server:
            self.fails("FAILED_PRECONDITION", "order is hnd, expected nhd", server.address)
        for name, value in (
            ("num_layers", 0), ("num_layers", 1025), ("head_dim", 0), ("head_dim", 1025), ("num_kv_heads", 1025),
            ("num_heads", 3),
        ):  # fmt: skip
            with PlayedServer(lambda server, _, wrong={name: value}: iter([server.accepted(**wrong)])) as server:
                self.fails("FAILED_PRECONDITION", f"{name} is {value}", server.address)

    def test_a_full_server_says_when_to_come_back(self):
        retry = wire.RetryInfo()
        retry.retry_delay.seconds, retry.retry_delay.nanos = 2, 500_000_000
        status = wire.RpcStatus(code=8, message="full")
        status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=retry.SerializeToString())
        with PlayedServer(refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", status)) as server:
            error = self.fails("RESOURCE_EXHAUSTED", "the queue is full; come back in 2.5 s", server.address)
        self.assertEqual((error.retry_after, error.retryable), (2.5, True))
        self.assertIn("retry_after", error.advice)

    def test_a_server_that_cancels_is_unavailable(self):
        with PlayedServer(refusing(grpc.StatusCode.CANCELLED, "shutting down")) as server:
            error = self.fails("UNAVAILABLE", "cancelled the call", server.address)
            self.assertNotIsInstance(error, Cancelled)

    def test_a_call_can_be_cancelled_before_it_is_accepted(self):
        with PlayedServer(silent) as server:
            self.assertIsInstance(self.cancelled(server), Cancelled)
            self.assertTrue(server.ended.acquire(timeout=PATIENCE))

    def test_a_server_that_is_away_passes_the_call_on(self):
        with PlayedServer(whole) as server, PlayedServer(refusing(grpc.StatusCode.INVALID_ARGUMENT, "no")) as other:
            blocks, _ = self.receive(["127.0.0.1:1", server.address, other.address])
            self.assertEqual((len(blocks), len(other.requests)), (LAYERS, 0))
            self.fails("INVALID_ARGUMENT", "no", [other.address, server.address])

    def test_a_server_that_passes_a_resumable_call_on_is_told_that_it_is_over(self):
        with PlayedServer(refusing(grpc.StatusCode.UNAVAILABLE, "lost")) as first, PlayedServer(whole) as second:
            self.receive([first.address, second.address], request_id="passed on", resumable=True)
            self.assertEqual(first.cancelled.get(timeout=PATIENCE), "passed on")
            self.assertEqual(len(second.requests), 1)

    def test_a_server_that_dies_midway_does_not(self):
        def script(server, context):
            yield server.accepted()
            yield frame(0)
            context.abort(grpc.StatusCode.UNAVAILABLE, "device lost")

        with PlayedServer(script) as server, PlayedServer(whole) as other:
            self.fails("UNAVAILABLE", "device lost", [server.address, other.address])
            self.assertEqual(len(other.requests), 0)

    def test_lanes_that_could_reach_different_servers_are_refused(self):
        with self.assertRaisesRegex(ValueError, "several servers"):
            self.receive("ipv4:127.0.0.1:1,127.0.0.1:2", lanes=2)
        for lanes in (0, 17):
            with self.assertRaisesRegex(ValueError, "1 to 16"):
                self.receive("127.0.0.1:1", lanes=lanes)

    def test_a_timeout_ends_the_call(self):
        with PlayedServer(silent) as server:
            self.fails("DEADLINE_EXCEEDED", "", server.address, timeout=0.5)

    def test_a_pushed_cache_does_not_come_here(self):
        with PlayedServer(lambda server, _: iter([server.accepted(), server.result()])) as server:
            blocks, stream = self.receive(server.address, deliver_to=Delivery("worker:1", "t"))
            self.assertEqual((blocks, stream.result.num_tokens), ([], len(TOKENS)))
            self.assertEqual(server.requests[0].deliver_to.transfer_id, "t")
        with PlayedServer(whole) as server:
            self.fails("DATA_LOSS", "delivered elsewhere", server.address, deliver_to=Delivery("worker:1", "t"))

    def fails(self, code, text, address, **arguments):
        with self.assertRaisesRegex(PrefilldError, text) as caught:
            self.receive(address, **arguments)
        self.assertEqual(caught.exception.code.name, code)
        return caught.exception


class Blocking(Streams, unittest.TestCase):
    def receive(self, address, **arguments):
        with PrefillClient(address) as client, client.prefill(TOKENS, **arguments) as stream:
            return list(stream), stream

    def attached(self, address, receiver, num_tokens=len(TOKENS), **arguments):
        with PrefillClient(address) as client:
            with client.attach_receiver("a", "secret", receiver, num_tokens, **arguments) as stream:
                return list(stream), stream

    def cancelled(self, server):
        with PrefillClient(server.address) as client:
            stream = client.submit(TOKENS)
            with self.assertRaisesRegex(RuntimeError, "not accepted"):
                stream.layout
            threading.Timer(0.3, stream.cancel).start()
            with self.assertRaises(PrefilldError) as caught:
                stream.wait_accepted()
        return caught.exception

    def test_leaving_midway_ends_the_threads_of_the_lanes(self):
        def lanes():
            return [thread for thread in threading.enumerate() if thread.name.startswith("prefilld-lane")]

        with PlayedServer(whole, lanes=3) as server, PrefillClient(server.address) as client:
            with client.prefill(TOKENS, lanes=3) as stream:
                next(stream)
            deadline = time.monotonic() + PATIENCE
            while lanes() and time.monotonic() < deadline:
                time.sleep(0.01)
        self.assertEqual(lanes(), [])

    def test_a_cache_is_read_whole(self):
        with PlayedServer(whole, lanes=2) as server, PrefillClient(server.address) as client:
            with client.prefill(TOKENS, lanes=2) as stream:
                cache = stream.read_all()
        self.assertEqual(cache.shape, (LAYERS, 2, BLOCKS, 16, 2, 4))
        self.assertEqual([cache[layer].flat[0] for layer in range(LAYERS)], [1000 * i for i in range(LAYERS)])


class Asyncio(Streams, unittest.TestCase):
    def receive(self, address, **arguments):
        async def read():
            async with AsyncPrefillClient(address) as client:
                async with await client.prefill(TOKENS, **arguments) as stream:
                    return [blocks async for blocks in stream], stream

        return asyncio.run(read())

    def attached(self, address, receiver, num_tokens=len(TOKENS), **arguments):
        async def read():
            async with AsyncPrefillClient(address) as client:
                async with client.attach_receiver("a", "secret", receiver, num_tokens, **arguments) as stream:
                    return [blocks async for blocks in stream], stream

        return asyncio.run(read())

    def cancelled(self, server):
        async def read():
            async with AsyncPrefillClient(server.address) as client:
                stream = client.submit(TOKENS)
                asyncio.get_running_loop().call_later(0.3, stream.cancel)
                with self.assertRaises(PrefilldError) as caught:
                    await stream.wait_accepted()
                return caught.exception

        return asyncio.run(read())

    def test_cancelling_the_task_ends_the_call(self):
        async def read(server):
            async with AsyncPrefillClient(server.address) as client:
                task = asyncio.ensure_future(client.prefill(TOKENS))
                while not server.requests:
                    await asyncio.sleep(0.01)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
                return await asyncio.to_thread(server.ended.acquire, timeout=PATIENCE)

        with PlayedServer(silent) as server:
            self.assertTrue(asyncio.run(read(server)))

    def test_several_calls_run_at_once(self):
        together = threading.Barrier(3)

        def script(server, context):
            together.wait(PATIENCE)
            yield from whole(server, context)

        async def read(server):
            async with AsyncPrefillClient(server.address) as client:

                async def one():
                    async with client.submit(TOKENS, lanes=2) as stream:
                        return (await stream.read_all()).sum()

                return await asyncio.gather(one(), one(), one())

        with PlayedServer(script, lanes=2) as server:
            sums = asyncio.run(read(server))
        self.assertEqual(len(set(sums)), 1)


class Messages(unittest.TestCase):
    def test_a_frame_whose_number_is_damaged_is_not_one_that_came_before(self):
        check = TransferCheck(layout(), resumable=True)
        for sequence in (0, 1):
            self.assertIsNotNone(check.take(frame(sequence, sequence=sequence).kv_frame))
        self.assertIsNone(check.take(frame(1, sequence=1).kv_frame))
        for place in (dict(layer=2), dict(layer=LAYERS), dict(layer=1, first_block=1)):
            with self.assertRaisesRegex(TransferError, "where frame 2 was due"):
                check.take(frame(**place, sequence=0).kv_frame)
        self.assertIsNotNone(check.take(frame(2, sequence=2).kv_frame))

    def test_what_is_beyond_repair_stays_so(self):
        check = TransferCheck(layout(), resumable=True)
        for sequence in (0, 0, 0, *range(1, LAYERS * BLOCKS)):
            with self.assertRaises(Damaged):
                check.take(frame(0, sequence=sequence, checksum=7).kv_frame)
        self.assertFalse(check.is_beyond_repair)
        for sequence in (0, LAYERS * BLOCKS):  # once too often, and one more than blocks are missing
            with self.assertRaisesRegex(TransferError, "checksum"):
                check.take(frame(0, sequence=sequence, checksum=7).kv_frame)
            self.assertTrue(check.is_beyond_repair)

    def test_frames_are_read_as_protobuf_reads_them(self):
        random = np.random.default_rng(1)
        for size in (0, 1, 127, 128, 70_000):
            fields = {name: int(random.integers(0, 2**31)) for name in ("lane", "layer", "first_block", "num_blocks")}
            sequence, checksum = (int(random.integers(0, 2**63)) for _ in range(2))
            event = frame(0, checksum=checksum)
            event.kv_frame.MergeFrom(wire.KvFrame(**fields, sequence=sequence, sent_at_us=2**40))
            event.kv_frame.payload = random.bytes(size)
            read = read_event(event.SerializeToString())
            self.assertIsInstance(read, Frame)
            for name in Frame._fields:
                self.assertEqual(getattr(read, name), getattr(event.kv_frame, name), name)

    def test_an_unusual_encoding_is_left_to_protobuf(self):
        usual = frame(3).SerializeToString()
        again = wire.PrefillEvent(kv_frame=wire.KvFrame(lane=2)).SerializeToString()
        for data in (usual + b"\xf8\x07\x01", usual + again):
            self.assertEqual(read_event(data).layer, 3)

    def test_bytes_that_are_no_event_are_refused(self):
        usual = frame(3).SerializeToString()
        for data in (usual[:-1], usual[:9], b"\x1a", b"\xff\xff"):
            with self.assertRaisesRegex(TransferError, "no PrefillEvent"):
                read_event(data)

    def test_arrays_are_views_of_the_message(self):
        shared = 0
        for request in range(8):  # messages whose payloads stand at different places
            data = frame(1, first_block=0, sent_at_us=128**request).SerializeToString()
            read = read_event(data)
            self.assertIs(read.payload.obj, data)
            blocks = TransferCheck(layout()).take(read)
            self.assertTrue(blocks.keys.flags.aligned)
            shared += np.shares_memory(blocks.keys, np.frombuffer(data, np.uint8))
        self.assertGreater(shared, 0)

    def test_keys_and_values_of_an_interleaved_block_are_views_of_it(self):
        for order, tokens_inside in (("nh2d", False), ("hn2d", True)):
            described = layout(order=wire.enum_value("KvOrder", order))
            data = frame(1).SerializeToString()
            blocks = TransferCheck(described).take(read_event(data))
            axes = (2, 16) if tokens_inside else (16, 2)
            wanted = 1000 + np.arange(2 * BLOCKS * 16 * 2 * 4).reshape(BLOCKS, *axes, 2, 4)
            np.testing.assert_array_equal(blocks.array, wanted)
            np.testing.assert_array_equal(blocks.keys, wanted[..., 0, :])
            np.testing.assert_array_equal(blocks.values, wanted[..., 1, :])
            self.assertTrue(np.shares_memory(blocks.keys, blocks.array) and np.shares_memory(blocks.values, blocks.array))
            cache = WholeCache(described)
            cache.store(blocks)
            np.testing.assert_array_equal(cache.array[1, 1], wanted[..., 1, :])

    def test_an_error_survives_a_pickle(self):
        aborted, lost = grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS
        for error in (PrefilldError(aborted, "slow", 1.5), Cancelled(), TransferError(lost, "x")):
            again = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(again), str(again), again.retry_after), (type(error), str(error), error.retry_after))


class Tensors(unittest.TestCase):
    def setUp(self):
        with contextlib.suppress(ImportError):
            import torch

            self.torch = torch
            return
        self.skipTest("torch is not here")

    def test_share_the_memory_of_the_arrays_and_warn_of_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for dtype, kind in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
                described = layout(dtype=wire.enum_value("DType", dtype))
                size = 2 if dtype != "fp32" else 4
                payload = np.arange(2 * BLOCKS * 16 * 2 * 4 * size, dtype=np.uint8).tobytes()
                blocks = TransferCheck(described).take(frame(0, payload=payload).kv_frame)
                keys, values = blocks.torch()
                self.assertEqual((str(keys.dtype), tuple(keys.shape)), (f"torch.{kind}", blocks.keys.shape))
                self.assertEqual(keys.data_ptr(), blocks.keys.ctypes.data)
                kept = self.torch.cat([keys, values]).view(-1).view(self.torch.int16)
                del blocks
                self.assertEqual(kept.numpy().tobytes(), payload)

    def test_share_the_memory_of_an_interleaved_block(self):
        blocks = TransferCheck(layout(order=wire.enum_value("KvOrder", "nh2d"))).take(frame(2).kv_frame)
        for tensor, array in zip(blocks.torch(), (blocks.keys, blocks.values)):
            self.assertEqual(tensor.data_ptr(), array.ctypes.data)
            self.assertEqual(tensor.tolist(), array.tolist())

    def test_are_those_of_a_layout(self):
        from prefilld import to_torch

        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        self.assertEqual(to_torch(array.T).tolist(), array.T.tolist())
        with self.assertRaisesRegex(ValueError, "strides"):
            to_torch(array[::-1])
        self.assertEqual(tuple(to_torch(np.zeros((0, 3), np.float32)).shape), (0, 3))


if __name__ == "__main__":
    unittest.main()
