"""Tests resumable calls of the Python client, and how closing a client ends calls, beside a server that the test plays.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import asyncio
import sys
import threading
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    from played_server import PATIENCE, TOKENS, PlayedServer, accepting, frame
    from prefilld import AsyncPrefillClient, Cancelled, PrefillClient, PrefilldError, TransferError, wire
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class BeyondRepair(unittest.TestCase):
    """Lane 1 brings one frame, which is damaged each time, while lane 0 shows that the computation makes progress."""

    def setUp(self):
        def script(server, context):
            yield next(accepting(server, context))
            while context.is_active():
                yield wire.PrefillEvent(progress=wire.Progress(layers_computed=1))
                over.wait(0.01)

        over = threading.Event()
        self.server = self.enterContext(PlayedServer(script, lanes=2))
        self.server.frames = lambda lane: [frame(1, lane, checksum=7)] * 4 if lane == 1 else []
        self.addCleanup(over.set)

    def expect_given_up(self, caught):
        self.assertIn("checksum", str(caught.exception))
        self.assertEqual(caught.exception.code, grpc.StatusCode.DATA_LOSS)
        self.assertEqual(self.server.resumed, 0)

    def test_ends_a_call(self):
        with PrefillClient(self.server.address) as client:
            with client.submit(TOKENS, lanes=2, resumable=True, timeout=PATIENCE) as stream:
                with self.assertRaises(TransferError) as caught:
                    list(stream)
        self.expect_given_up(caught)

    def test_ends_a_call_of_asyncio(self):
        async def read():
            async with AsyncPrefillClient(self.server.address) as client:
                async with client.submit(TOKENS, lanes=2, resumable=True, timeout=PATIENCE) as stream:
                    await stream.read_all()

        with self.assertRaises(TransferError) as caught:
            asyncio.run(read())
        self.expect_given_up(caught)


class Closing(unittest.TestCase):
    def test_closing_the_client_cancels_a_resumable_call(self):
        with PlayedServer(accepting) as server:
            client = PrefillClient(server.address)
            stream = client.prefill(TOKENS, resumable=True)
            threading.Timer(0.3, client.close).start()
            with self.assertRaises(Cancelled):
                stream.read_all()

    def test_closing_the_client_ends_its_streams(self):
        async def read(server, lanes):
            client = AsyncPrefillClient(server.address)
            stream = await client.prefill(TOKENS, lanes=lanes)
            reader = asyncio.ensure_future(stream.read_all())
            while len(server.attached) < lanes - 1:
                await asyncio.sleep(0.01)
            await client.close()
            with self.assertRaises(Cancelled):
                await asyncio.wait_for(reader, PATIENCE)

        for lanes in (1, 2):
            with self.subTest(lanes=lanes), PlayedServer(accepting, lanes=lanes) as server:
                over = threading.Event()
                server.frames = lambda _, over=over: iter(lambda: over.wait(PATIENCE), True)
                self.addCleanup(over.set)
                asyncio.run(read(server, lanes))
                over.set()

    def test_closing_that_is_cancelled_closes_the_connections(self):
        async def run(server):
            client = AsyncPrefillClient(server.address)
            streams = [await client.prefill(TOKENS, resumable=True) for _ in range(2)]
            closing = asyncio.ensure_future(client.close())
            for _ in streams:
                await asyncio.to_thread(server.cancelled.get, timeout=PATIENCE)
            self.assertFalse(closing.done())
            closing.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await closing
            with self.assertRaisesRegex(grpc.aio.UsageError, "closed"):
                await client.is_serving()

        def cancel_late(server, request, context):
            server.cancelled.put(request.request_id)
            over.wait(PATIENCE)
            return wire.CancelResponse()

        over = threading.Event()
        self.addCleanup(over.set)
        with mock.patch.object(PlayedServer, "_cancel", cancel_late), PlayedServer(accepting) as server:
            asyncio.run(run(server))
            over.set()

    def test_a_closed_connection_is_one_of_the_family(self):
        async def run(server):
            client = AsyncPrefillClient(server.address)
            stream = await client.prefill(TOKENS, resumable=True)
            for channel in client._servers.channels():
                await channel.close()
            with self.assertRaises(Cancelled):
                await stream._again(0, stream._lane0, PrefilldError(grpc.StatusCode.UNAVAILABLE, "broken"))
            stream._reception.receipts.note(0, 1)
            stream._resumers[-1].acknowledge()
            await asyncio.sleep(0)  # the task must have looked whether the request is over
            stream.cancel()
            tasks = list(stream._resumers[-1]._tasks)
            await stream._await_end()
            self.assertEqual([task.exception() for task in tasks], [None, None])

        with PlayedServer(accepting) as server:
            asyncio.run(run(server))


if __name__ == "__main__":
    unittest.main()
