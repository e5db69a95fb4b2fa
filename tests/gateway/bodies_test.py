#!/usr/bin/env python3
"""Tests requests that come slowly, not at all, or too large, with a gateway beside servers that the test plays.

Exits with 77 (skipped, for CTest) without the client's packages or the gateway's.
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "python")]
try:
    import jinja2  # noqa: F401
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
    from gateway_process import ask, read_reply
    from played_gateway import COMPLETIONS, PREFILL_CALL, PlayedGateway, request
    from played_peers import text_of
    from prefilld.gateway.bodies import LARGE_BYTES, SideThreads
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

PATIENCE = 30


def post(content: bytes, announced: int | None = None) -> bytes:
    length = len(content) if announced is None else announced
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (COMPLETIONS.encode(), length, content)


class Bodies(PlayedGateway):
    async def connect(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
        self.addCleanup(writer.close)
        return reader, writer

    async def ends(self, reader, writer, trickle=b""):
        """Waits until the gateway has cut the connection, over which a byte comes now and then."""
        end = time.monotonic() + PATIENCE
        reading = asyncio.ensure_future(reader.read())
        while not reading.done():
            self.assertLess(time.monotonic(), end, "the connection is still open")
            if trickle and not writer.is_closing():
                writer.write(trickle)
            await asyncio.wait({reading}, timeout=0.1)
        return b"" if reading.exception() else reading.result()

    async def test_connections_without_a_request_are_cut(self):
        await self.start("--receive_timeout_s=0.5")
        for begin, trickle in ((b"", b""), (b"POST ", b"x"), (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n")):
            reader, writer = await self.connect()
            writer.write(begin)
            self.assertEqual(await self.ends(reader, writer, trickle), b"")
        # The rest of a body whose answer was given already.
        reader, writer = await self.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        self.assertTrue((await self.ends(reader, writer, b"x")).startswith(b"HTTP/1.1 200"))

    async def test_a_connection_may_be_idle_between_requests(self):
        await self.start("--receive_timeout_s=0.5")
        reader, writer = await self.connect()
        for _ in range(2):
            writer.write(post(json.dumps(request(4)).encode()))
            self.assertEqual((await read_reply(reader)).text, text_of(4))
            await asyncio.sleep(1.5)
        writer.write(b"GET ")
        self.assertEqual(await self.ends(reader, writer, b"x"), b"")

    async def test_a_slow_body_is_refused_and_a_routers_with_a_code_that_lets_it_decode(self):
        await self.start("--receive_timeout_s=0.5")
        call = b'{"kv_transfer_params": {"do_remote_decode" : true}, "prompt": "a'
        escaped = rb'{"prompt": "\"do_remote_decode\": true'
        for begin, status in ((b'{"prompt": "a', 408), (call, 503), (escaped, 408)):
            reader, writer = await self.connect()
            writer.write(post(begin, announced=100_000))
            reply = await read_reply(reader)
            self.assertEqual(reply.status, status, begin)
            self.assertIn("the body did not come within 0.5 s", reply.error["message"])
            self.assertEqual(reply.headers.get("retry-after"), "1" if status == 503 else None)

    async def test_without_workers_every_body_that_cannot_be_read_is_taken_for_a_routers(self):
        await self.start("--receive_timeout_s=0.5", "--max_body_bytes=2000", workers=0)
        reader, writer = await self.connect()
        writer.write(post(b'{"prompt": "a', announced=1000))
        self.assertEqual((await read_reply(reader)).status, 503)
        large = await ask(self.gateway.port, COMPLETIONS, request(4, user="x" * 3000))
        self.assertEqual((large.status, large.error["code"]), (503, "overloaded"))

    async def test_a_routers_body_that_is_too_large_is_answered_as_one_that_nobody_can_read(self):
        await self.start("--max_body_bytes=2000")
        # Most of it comes after the limit, and what says whose it is may come last.
        for body in ({"kv_transfer_params": PREFILL_CALL, "prompt": "a" * 500_000},
                     {"prompt": "a" * 500_000, "kv_transfer_params": PREFILL_CALL}):  # fmt: skip
            reply = await ask(self.gateway.port, COMPLETIONS, body)
            self.assertEqual(reply.status, 200)
            self.assertTrue(reply.json["kv_transfer_params"]["do_remote_prefill"])
        self.assertEqual(await self.metric("unread_prompts_total"), 2)
        large = await ask(self.gateway.port, COMPLETIONS, request(4, user="x" * 500_000))
        self.assertEqual(large.status, 413)
        self.assertIn("allowed: 2000", large.error["message"])

    async def test_bodies_in_all_are_bounded(self):
        await self.start("--max_body_bytes=2000", "--max_pending_body_bytes=3000")
        first = json.dumps(request(4, user="x" * 1800)).encode()
        second = request(5, user="x" * 1500)
        reader, writer = await self.connect()
        writer.write(post(first[:-1], announced=len(first)))
        reply, end = None, time.monotonic() + PATIENCE
        while (reply is None or reply.status == 200) and time.monotonic() < end:  # the first may not be there yet
            reply = await ask(self.gateway.port, COMPLETIONS, second)
        self.assertEqual((reply.status, reply.error["code"], reply.headers["retry-after"]), (503, "overloaded", "1"))
        writer.write(first[-1:])
        self.assertEqual((await read_reply(reader)).text, text_of(4))
        self.assertEqual((await ask(self.gateway.port, COMPLETIONS, second)).text, text_of(5))

    async def test_large_bodies_are_read_by_a_process_that_may_die(self):
        await self.start()
        large = request(4, user="x" * (2 * LARGE_BYTES))
        self.assertEqual((await ask(self.gateway.port, COMPLETIONS, large)).text, text_of(4))
        wrong = await ask(self.gateway.port, COMPLETIONS, {**large, "n": 2})
        self.assertEqual((wrong.status, wrong.error["param"]), (400, "n"))
        (reader,) = self.readers()
        os.kill(reader, signal.SIGKILL)
        reply, end = await ask(self.gateway.port, COMPLETIONS, large), time.monotonic() + PATIENCE
        while reply.status == 503 and time.monotonic() < end:
            self.assertIn("is started again", reply.error["message"])
            reply = await ask(self.gateway.port, COMPLETIONS, large)
        self.assertEqual(reply.text, text_of(4))
        self.assertNotIn(reader, self.readers())

    def readers(self):
        """Returns the processes that the gateway has started for bodies."""
        tasks = Path(f"/proc/{self.gateway.process.pid}/task")
        children = [pid for file in tasks.glob("*/children") for pid in file.read_text().split()]
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class Threads(unittest.IsolatedAsyncioTestCase):
    async def test_small_work_does_not_wait_for_large(self):
        threads, go_on, began = SideThreads(), threading.Event(), threading.Event()

        def large():
            began.set()
            return go_on.wait(PATIENCE)

        working = [asyncio.ensure_future(threads.run(LARGE_BYTES + 1, large)) for _ in range(20)]
        self.assertTrue(await asyncio.to_thread(began.wait, PATIENCE))
        self.assertEqual(await asyncio.wait_for(threads.run(LARGE_BYTES, lambda: 7), PATIENCE), 7)
        go_on.set()
        self.assertEqual(await asyncio.gather(*working), [True] * 20)


if __name__ == "__main__":
    unittest.main()
