#!/usr/bin/env python3
"""Tests requests that come slowly, not at all, or too large, with a gateway beside servers that the test plays.

Exits with 77 (skipped, for CTest) without the client's packages or the gateway's.
"""

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
import types
import unittest
import unittest.mock
import weakref
from array import array
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "python")]
try:
    import jinja2  # noqa: F401
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
    from gateway_process import ask, read_reply
    from played_gateway import CHATS, COMPLETIONS, PREFILL_CALL, PlayedGateway, request
    from played_peers import text_of
    from prefilld.gateway.bodies import LARGE_BYTES, ParsingProcess, SideThreads
    from prefilld.gateway.bodies import Bodies as BodiesInAll
    from prefilld.gateway.openai_requests import BadRequest
    from prefilld.gateway.service import Service
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
        end, came, reading = time.monotonic() + PATIENCE, b"", None
        while True:
            reading = reading or asyncio.ensure_future(reader.read(4096))
            self.assertLess(time.monotonic(), end, "the connection is still open")
            if trickle and not writer.is_closing():
                writer.write(trickle)
            await asyncio.wait({reading}, timeout=0.1)
            if not reading.done():
                continue
            if reading.exception() or not reading.result():  # a reset may come behind what was sent before it
                return came
            came, reading = came + reading.result(), None

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

    async def test_a_connection_may_be_idle_after_a_body_that_nobody_waited_for(self):
        await self.start("--receive_timeout_s=0.5")
        reader, writer = await self.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        self.assertEqual((await read_reply(reader)).status, 200)
        for half in (b"x" * 5, b"x" * 5):
            await asyncio.sleep(0.05)
            writer.write(half)
        await asyncio.sleep(1.5)
        writer.write(post(json.dumps(request(4)).encode()))
        self.assertEqual((await read_reply(reader)).text, text_of(4))

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
        self.assertEqual(await self.metric("requests_total", route="prefill_call", outcome="503"), 1)
        self.assertEqual(await self.metric("requests_total", route="completions", outcome="408"), 2)

    async def test_without_workers_every_body_that_cannot_be_read_is_taken_for_a_routers(self):
        await self.start("--receive_timeout_s=0.5", "--max_body_bytes=2000", workers=0)
        reader, writer = await self.connect()
        writer.write(post(b'{"prompt": "a', announced=1000))
        self.assertEqual((await read_reply(reader)).status, 503)
        large = await ask(self.gateway.port, COMPLETIONS, request(4, user="x" * 3000))
        self.assertEqual((large.status, large.error["code"]), (503, "overloaded"))

    async def test_a_body_that_still_comes_takes_the_room_of_any_path(self):
        await self.start("--max_requests=1", workers=0)
        _, writer = await self.connect()
        writer.write(post(b'{"prompt": "a', announced=1000))
        await self.wait(lambda: self.gateway.metric("prefilld_gateway_running_requests") == 1, "the body is read")
        call = {"messages": [{"role": "user", "content": "Hello"}], "kv_transfer_params": PREFILL_CALL}
        full = await ask(self.gateway.port, CHATS, call)
        self.assertEqual((full.status, full.error["code"]), (503, "overloaded"))
        self.assertEqual(await self.metric("requests_total", route="prefill_call", outcome="503"), 1)
        writer.close()
        await self.nothing_runs()
        self.assertEqual((await ask(self.gateway.port, COMPLETIONS, request(4, kv_transfer_params=PREFILL_CALL))).status, 200)

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

    async def test_the_process_that_reads_bodies_ends_with_the_gateway_and_not_before(self):
        await self.start()
        large = request(4, user="x" * (2 * LARGE_BYTES))
        self.assertEqual((await ask(self.gateway.port, COMPLETIONS, large)).text, text_of(4))
        (reader,) = self.readers()
        for number in (signal.SIGINT, signal.SIGTERM):  # as service managers send it to all processes of a service
            os.kill(reader, number)
        self.assertEqual((await ask(self.gateway.port, COMPLETIONS, large)).text, text_of(4))
        self.assertEqual(self.readers(), [reader])
        self.gateway.process.kill()
        await self.wait(lambda: not Path(f"/proc/{reader}").exists(), "the process has ended")

    def readers(self):
        """Returns the processes that the gateway has started for bodies."""
        tasks = Path(f"/proc/{self.gateway.process.pid}/task")
        children = [pid for file in tasks.glob("*/children") for pid in file.read_text().split()]
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class Parsing(unittest.IsolatedAsyncioTestCase):
    """Large chats, read by the process."""

    CONTENT = "a" * LARGE_BYTES

    async def asyncSetUp(self):
        self.parser = ParsingProcess()
        self.addCleanup(self.parser.close)

    async def parse(self, message, **fields):
        body = {"messages": [{"role": "user", "content": self.CONTENT, **message}], **fields}
        return await self.parser.parse(bytearray(json.dumps(body).encode()), True)

    async def test_what_is_no_text_is_bounded_and_a_prefill_call_then_goes_unread(self):
        tools = {"kv_transfer_params": PREFILL_CALL, "tools": [{}]}
        ask = await self.parse({"name": "n"}, **tools)
        self.assertEqual((ask.prompt[0]["content"], ask.template), (self.CONTENT, {"tools": [{}]}))
        self.assertGreater(ask.num_bytes, LARGE_BYTES)
        deep = json.loads("[" * 900 + "]" * 900)
        for value, reason in (([{}] * LARGE_BYTES, "allowed: 262144"), (deep, "too deep")):
            for message, fields in (({"x": value}, {}), ({}, {"chat_template_kwargs": {"x": value}})):
                with self.assertRaisesRegex(BadRequest, reason) as caught:
                    await self.parse(message, **fields)
                self.assertEqual(caught.exception.status, 400)
                ask = await self.parse(message, **fields, **tools)
                self.assertEqual((ask.is_prefill_call, ask.prompt, ask.template), (True, None, {}))

    async def test_token_ids_come_as_an_array(self):
        ids = list(range(100_000))
        ask = await self.parser.parse(bytearray(json.dumps({"prompt": ids}).encode()), False)
        self.assertEqual(ask.prompt, array("I", ids))


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

    async def test_what_waits_is_gone_with_its_task_and_what_runs_keeps_its_thread(self):
        asyncio.get_running_loop().set_debug(False)  # it would keep what it ran
        threads, go_on, began = SideThreads(), threading.Event(), threading.Event()

        class Prompt:
            pass

        def hold(prompt):
            began.set()
            go_on.wait(PATIENCE)

        prompts = [Prompt() for _ in range(20)]
        seen = weakref.WeakSet(prompts)
        working = [asyncio.ensure_future(threads.run(LARGE_BYTES + 1, hold, prompts.pop())) for _ in range(20)]
        self.assertTrue(await asyncio.to_thread(began.wait, PATIENCE))
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        del task
        working.clear()
        gc.collect()
        self.assertEqual(len(seen), 1)
        last = asyncio.ensure_future(threads.run(LARGE_BYTES + 1, lambda: 7))
        await asyncio.wait({last}, timeout=0.1)
        self.assertFalse(last.done())
        go_on.set()
        self.assertEqual(await asyncio.wait_for(last, PATIENCE), 7)

    async def test_a_body_keeps_its_room_until_its_prompt_is_tokens(self):
        go_on, sizes = threading.Event(), []

        class Threads(SideThreads):
            async def run(self, size, work, *arguments):
                sizes.append(size)
                return await super().run(size, work, *arguments)

        class Request:
            async def stream(self):
                yield content

        def tokens_of(text):
            go_on.wait(PATIENCE)
            return list(text.encode())

        content = json.dumps({"prompt": "a" * 500, "user": "b" * 400}).encode()
        bodies = BodiesInAll(Threads(), None, 1000, 1000, PATIENCE, True)
        prefills = types.SimpleNamespace(info=types.SimpleNamespace(max_prompt_tokens=499), fingerprint="")
        upstream = types.SimpleNamespace(prefills=prefills, workers=types.SimpleNamespace(members=[1]))
        prompts = types.SimpleNamespace(of_text=tokens_of)
        service = Service(prompts, upstream, None, Threads(), "m", 1, "")
        body = bodies.open(Request(), False)
        answering = asyncio.ensure_future(service.answer(await body.read(), body.drop, 0, 0))
        await asyncio.wait({answering}, timeout=0.1)
        with self.assertRaisesRegex(BadRequest, f"{len(content)} bytes wait"):
            bodies.take(100)
        go_on.set()
        with unittest.mock.patch("prefilld.gateway.service.prefix_keys") as keys:
            with self.assertRaisesRegex(BadRequest, "500 tokens, allowed: 1 to 499"):
                await answering
            self.assertFalse(keys.called)
        bodies.take(1000)
        self.assertEqual(sizes, [len(content)] * 2)


if __name__ == "__main__":
    unittest.main()
