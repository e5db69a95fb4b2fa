#!/usr/bin/env python3
"""Tests the gateway, a process of its own, beside prefilld and decode workers that the test plays.

1,000 requests of which every fifth has a fault, clients that leave or take nothing, and every limit.

Exits with 77 (skipped, for CTest) without the client's packages or the gateway's.
"""

import asyncio
import hashlib
import json
import random
import socket
import sys
import time
import unittest
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "python")]
try:
    import jinja2  # noqa: F401
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
    from gateway_process import ask
    from played_gateway import CHATS, COMPLETIONS, PREFILL_CALL, PlayedGateway, request
    from played_peers import text_of
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

REQUESTS, AT_ONCE, TIMEOUT_S = 1000, 32, 8

# Each fault of PlayedPeers, and how a request ends that has it: with the right answer (200), or the code of an error.
FAULTS = {
    "prefilld is full once": 200,
    "prefilld is full": 429,
    "prefilld goes away once": 200,
    "prefilld breaks off once": 200,
    "prefilld fails inside": 502,
    "prefilld is silent": 504,
    "worker is full once": 200,
    "worker refuses the request": 400,
    "worker goes away before a token once": 200,
    "worker goes away midway": 503,
    "prefilld is silent, and the client leaves": None,
}


class Faults(PlayedGateway):
    async def test_a_thousand_requests_of_which_every_fifth_has_a_fault(self):
        await self.start(f"--request_timeout_s={TIMEOUT_S}")
        chance = random.Random(5)
        numbers = range(1, REQUESTS + 1)
        for i, number in enumerate(chance.sample(numbers, REQUESTS // 5)):
            self.peers.faults[number] = list(FAULTS)[i % len(FAULTS)]
        places, ended = asyncio.Semaphore(AT_ONCE), Counter()
        await asyncio.gather(*(self.one(n, n % 2 == 0, places, ended) for n in (10_001, 10_002)))
        files = self.gateway.open_files()

        began = time.monotonic()
        await asyncio.gather(*(self.one(n, n % 2 == 0, places, ended) for n in numbers))
        seconds = time.monotonic() - began
        print(f"{REQUESTS} requests in {seconds:.1f} s; {dict(ended)}", file=sys.stderr)

        self.assertEqual(ended.total(), REQUESTS + 2)
        self.assertGreater(min(ended[status] for status in (200, 400, 429, 502, 503, 504, None)), 10)
        # On a machine that is very busy, both servers of a kind may seem to be away for longer than prompts wait. Each
        # fault above hits more requests than this.
        self.assertLess(ended["unlucky"], 10)
        await self.nothing_runs()
        self.assertEqual(self.peers._pushed, {})
        await self.wait(lambda: self.gateway.open_files() <= files + 2, f"no more than {files} files are open")
        self.assertEqual(await self.metric("requests_total"), REQUESTS + 2)
        self.assertGreater(await self.metric("requests_total", outcome="cancelled"), 10)
        self.assertEqual(self.gateway.process.poll(), None)
        self.assertNotIn("Traceback", self.gateway.log())

    async def one(self, number, stream, places, ended):
        """Sends one request and looks at how it ends."""
        fault = self.peers.faults.get(number, "")
        expected = FAULTS.get(fault, 200)
        body = request(number, stream=stream)
        async with places:
            asking = asyncio.ensure_future(ask(self.gateway.port, COMPLETIONS, body))
            if expected is None:
                await asyncio.wait({asking}, timeout=0.3)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                ended[None] += 1
                return
            reply = await asking
        where = (number, fault, reply)
        self.assertTrue(reply.is_whole, where)
        if expected == 200 and reply.status in (429, 503):
            ended["unlucky"] += 1
            self.assertTrue(reply.error["message"], where)
            return
        ended[expected] += 1
        if expected == 200:
            self.assertEqual((reply.status, reply.error, reply.text), (200, None, text_of(number)), where)
            return
        if stream and fault in ("worker goes away midway", "prefilld is silent"):
            code = "unavailable" if "away" in fault else "deadline_exceeded"
            self.assertEqual((reply.status, reply.error["code"]), (200, code), where)
            self.assertTrue(text_of(number).startswith(reply.text), where)
            self.assertNotIn(b"[DONE]", reply.body)
            self.assertEqual(b": waiting" in reply.body, "silent" in fault, where)  # it came after 5 s
            return
        self.assertEqual(reply.status, expected, where)
        self.assertTrue(reply.error["message"], where)
        if expected == 429:
            self.assertEqual(reply.headers["retry-after"], "7", where)
        if expected == 400:
            self.assertEqual(reply.error["param"], "max_tokens", where)

    async def test_a_client_that_leaves_ends_its_calls(self):
        await self.start()
        self.peers.faults[3] = "prefilld is silent"
        await ask(self.gateway.port, COMPLETIONS, request(0, max_tokens=10**8, stream=True), leave_after=500)
        await self.nothing_runs()
        asking = asyncio.ensure_future(ask(self.gateway.port, COMPLETIONS, request(3)))
        await self.wait(lambda: self.peers.running.total() == 2, "both calls have begun")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await self.nothing_runs()
        self.assertEqual(await self.metric("requests_total", outcome="cancelled"), 2)

    async def test_a_client_that_takes_nothing_is_cut_off(self):
        await self.start("--stall_timeout_s=1")
        content = json.dumps(request(0, max_tokens=10**8, stream=True)).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", self.gateway.port))
            client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                           % (COMPLETIONS.encode(), len(content), content))  # fmt: skip
            await self.wait(lambda: self.peers.running["_generate"], "the answer has begun")
            await self.nothing_runs()
        self.assertEqual(await self.metric("requests_total", outcome="cancelled"), 1)

    async def test_no_more_than_max_requests_are_answered_at_once(self):
        await self.start("--max_requests=1")
        self.peers.faults[3] = "prefilld is silent"
        asking = asyncio.ensure_future(ask(self.gateway.port, COMPLETIONS, request(3)))
        await self.wait(lambda: self.peers.running["_prefill"], "the first is computed")
        chat = {"messages": [{"role": "user", "content": "Hello"}]}
        for path, body in ((COMPLETIONS, request(4)), (CHATS, chat), (CHATS, {**chat, "kv_transfer_params": PREFILL_CALL}),
                           (COMPLETIONS, request(4, kv_transfer_params=PREFILL_CALL))):  # fmt: skip
            full = await ask(self.gateway.port, path, body)
            self.assertEqual((full.status, full.headers["retry-after"], full.error["code"]), (503, "1", "overloaded"))
        self.assertEqual(await self.metric("requests_total", route="chat", outcome="503"), 2)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await self.nothing_runs()
        self.assertEqual((await ask(self.gateway.port, COMPLETIONS, request(4))).text, text_of(4))
        long = await ask(self.gateway.port, COMPLETIONS, {"prompt": "a" * 1000})
        self.assertEqual((long.status, long.error["param"]), (400, "prompt"))
        self.assertIn("1001 tokens, allowed: 1 to 1000", long.error["message"])

    async def test_a_prompt_that_was_refused_is_not_remembered(self):
        await self.start()
        prompt = [3] + [1] * 300
        for fault, status, hits in (("prefilld is full", 429, 0), ("", 200, 0), ("", 200, 1)):
            self.peers.faults[3] = fault
            reply = await ask(self.gateway.port, COMPLETIONS, request(0, prompt=prompt))
            self.assertEqual((reply.status, await self.metric("prefix_hits_total")), (status, hits))
        call = request(0, prompt=[4] + [1] * 300, kv_transfer_params=PREFILL_CALL)
        for hits in (1, 2):  # a prefill call is remembered once it was answered
            self.assertEqual((await ask(self.gateway.port, COMPLETIONS, call)).status, 200)
            self.assertEqual(await self.metric("prefix_hits_total"), hits)
            # Until the servers have said that they have no queue, the prompt counts as one.
            await self.wait(lambda: self.gateway.metric("prefilld_gateway_queued_tokens") == 0, "nothing is queued")

    async def test_bodies_that_are_no_json_are_refused(self):
        await self.start()
        for wrong in (b"{", b"[" * 100_000, b"\xff", b'{"prompt": [' + b"9" * 5000 + b"]}"):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
            writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                         % (COMPLETIONS.encode(), len(wrong), wrong))  # fmt: skip
            self.assertIn(b" 400 ", await reader.readline(), wrong[:20])
            writer.close()

    async def test_stop_strings_end_the_answer_and_the_calls(self):
        await self.start()
        for stream in (False, True):
            reply = await ask(self.gateway.port, COMPLETIONS, request(12, stop=["r 12 gr", "12 gr"], stream=stream))
            self.assertEqual(reply.text, "answe")
            reply = await ask(self.gateway.port, COMPLETIONS, request(0, stop="AAAAB", max_tokens=20, stream=stream))
            self.assertEqual(reply.text, "A" * 20)
        reply = await ask(self.gateway.port, COMPLETIONS, request(0, stop="AAA", max_tokens=10**6))
        self.assertEqual((reply.text, reply.json["choices"][0]["finish_reason"]), ("", "stop"))
        await self.nothing_runs()

    async def test_answers_that_do_not_end_after_sigterm_are_cut_off(self):
        await self.start("--drain_timeout_s=1")
        self.peers.faults[3] = "prefilld is silent"
        asking = asyncio.ensure_future(ask(self.gateway.port, COMPLETIONS, request(3)))
        await self.wait(lambda: self.peers.running["_prefill"], "it is computed")
        self.gateway.process.terminate()
        self.assertEqual(await asyncio.to_thread(self.gateway.process.wait, 20), 0)
        reply = await asking
        self.assertEqual((reply.status, reply.error["message"]), (503, "the gateway shuts down"))
        await self.wait(lambda: not self.peers.running.total(), "no call runs at a server")

    async def test_what_the_operator_and_the_client_wish_goes_with_the_prefill(self):
        await self.start("--policy=share", "--metadata=x-tenant=search", "--default_max_tokens=33")
        await ask(self.gateway.port, COMPLETIONS, request(5, temperature=0.5, top_k=3, seed=8, cache_salt="s"))
        (prefill, metadata), *_ = self.peers.prefills
        self.assertEqual(metadata["x-tenant"], "search")
        self.assertEqual(prefill.attention.policy, 3)
        self.assertEqual((prefill.sampling.temperature, prefill.sampling.top_k, prefill.sampling.seed), (0.5, 3, 8))
        self.assertEqual(prefill.prefix_cache.salt, hashlib.sha256(b"s").hexdigest())
        self.assertEqual((prefill.request_id, prefill.model_fingerprint), (prefill.deliver_to.transfer_id, "played"))

    async def test_without_any_server_health_and_answers_say_so(self):
        await self.start()
        await self.peers.stop()
        await self.wait(lambda: self.gateway.get("/health")[0] == 503, "health says that no server is up")
        reply = await ask(self.gateway.port, COMPLETIONS, request(1))
        self.assertEqual((reply.status, reply.headers["retry-after"]), (503, "1"))
        self.assertIn("no decode worker can take the request", reply.error["message"])
        call = request(1, kv_transfer_params=PREFILL_CALL)
        reply = await ask(self.gateway.port, COMPLETIONS, call)
        self.assertEqual(reply.status, 503)
        self.assertIn("no prefilld can take the request", reply.error["message"])


if __name__ == "__main__":
    unittest.main()
