"""The bodies of requests: read within bounds of size, time and memory, and parsed beside the event loop.

A router's prefill call has rules of its own. llm-d's sidecar decodes without prefilld where the answer has a code from
500 on, and gives codes below it to its client as they are. So a prefill call that breaks a limit of the gateway alone
gets none of them: one that is too large is answered like any whose prompt cannot be read, and one that comes too
slowly, or finds no room, gets 503.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from starlette.requests import Request

from prefilld.gateway.openai_requests import Ask, BadRequest, read_request

LARGE_BYTES = 256 << 10  # bodies and prompts above this wait for each other, and smaller ones do not wait for them
_UNREADABLE = "the process that reads large bodies died; it is started again"
_MARK = re.compile(rb'(?<!\\)"do_remote_decode"\s{0,8}:\s{0,8}true')
_MARK_BYTES = 64  # the longest mark


class SideThreads:
    """Threads for work that would hold up the event loop: some for small pieces, and one for large ones."""

    def __init__(self):
        self._small = ThreadPoolExecutor(4, thread_name_prefix="gateway-small")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="gateway-large")

    async def run(self, size: int, work, *arguments) -> Any:
        """size: of what is worked on, in bytes or in what is like them."""
        pool = self._large if size > LARGE_BYTES else self._small
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


class ParsingProcess:
    """Reads large bodies in a process of its own: while Python reads JSON, nothing else of its process runs.

    It starts with the first such body, and again after it died. Belongs to one event loop.
    """

    def __init__(self):
        self._pool: ProcessPoolExecutor | None = None

    async def parse(self, body: bytearray, is_chat: bool) -> Ask:
        """Raises BadRequest."""
        if self._pool is None:
            # A fork would have gRPC's threads and locks, without what they wait for.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, initializer=_leave_interrupts_to_the_gateway)
        pool = self._pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, _parse, bytes(body), is_chat)
        except BrokenProcessPool:
            if self._pool is pool:
                self._pool = None
            raise BadRequest(_UNREADABLE, status=503, code="unavailable") from None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts_to_the_gateway() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Bodies:
    """Belongs to one event loop."""

    def __init__(
        self,
        threads: SideThreads,
        parser: ParsingProcess,
        max_bytes: int,
        max_pending_bytes: int,
        seconds: float,
        has_answers: bool,
    ):
        """max_bytes: of one body. max_pending_bytes: of all that are not parsed yet. seconds: until a body has come.

        has_answers: others than routers may ask; without, whatever cannot be read is taken for a prefill call.
        """
        self._threads = threads
        self._parser = parser
        self._max_bytes = max_bytes
        self._max_pending_bytes = max_pending_bytes
        self._seconds = seconds
        self._has_answers = has_answers
        self._pending_bytes = 0

    async def read(self, request: Request, is_chat: bool) -> Ask:
        """Raises BadRequest."""
        body = _Body(self, request)
        try:
            await asyncio.wait_for(body.receive(), self._seconds)
            if not body.is_whole:
                return Ask(is_chat=is_chat, prompt=None, is_prefill_call=True)
            if len(body.data) > LARGE_BYTES:
                return await self._parser.parse(body.data, is_chat)
            return await self._threads.run(len(body.data), _parse, bytes(body.data), is_chat)
        except asyncio.TimeoutError:  # before Python 3.11 it is no TimeoutError
            raise self._refusal(body, f"the body did not come within {self._seconds:g} s", 408) from None
        finally:
            body.drop()

    def take(self, num_bytes: int) -> None:
        """Counts bytes that a body keeps. Raises BadRequest where they are too many in all."""
        if self._pending_bytes + num_bytes > self._max_pending_bytes:
            message = f"bodies of {self._pending_bytes} bytes wait, at most {self._max_pending_bytes} may"
            raise BadRequest(message, status=503, code="overloaded")
        self._pending_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._pending_bytes -= num_bytes

    def is_too_large(self, num_bytes: int) -> bool:
        return num_bytes > self._max_bytes

    def too_large(self, body: _Body, num_bytes: int) -> BadRequest:
        message = f"the body has {num_bytes} bytes, allowed: {self._max_bytes}"
        return self._refusal(body, message, 413)

    def _refusal(self, body: _Body, message: str, status: int) -> BadRequest:
        if body.is_prefill_call or not self._has_answers:
            return BadRequest(message, status=503, code="overloaded")
        return BadRequest(message, status=status)


class _Body:
    """One body as it comes. data: what is kept of it. is_prefill_call: it says that it is one."""

    def __init__(self, bodies: Bodies, request: Request):
        self._bodies = bodies
        self._request = request
        self._num_bytes = 0
        self._tail = b""
        self.data = bytearray()
        self.is_whole = True
        self.is_prefill_call = False

    async def receive(self) -> None:
        """Reads to the end. A body that is too large is not kept, but read on, so that its sender hears the answer."""
        async for chunk in self._request.stream():
            self._num_bytes += len(chunk)
            self._look_for_mark(chunk)
            if self.is_whole and self._bodies.is_too_large(self._num_bytes):
                self.drop()
                self.is_whole = False
            elif self.is_whole:
                self._bodies.take(len(chunk))
                self.data += chunk
        if not self.is_whole and not self.is_prefill_call:
            raise self._bodies.too_large(self, self._num_bytes)

    def drop(self) -> None:
        self._bodies.give_back(len(self.data))
        self.data = bytearray()

    def _look_for_mark(self, chunk: bytes) -> None:
        if not self.is_prefill_call:
            self.is_prefill_call = _MARK.search(self._tail + chunk) is not None
            self._tail = (self._tail + chunk)[-_MARK_BYTES:]


def _parse(body: bytes, is_chat: bool) -> Ask:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    ask = read_request(parsed, is_chat)
    if not ask.is_prefill_call and b"\\ud" in body.lower():
        try:  # a name or a role may have one, too
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRequest("the body has half a surrogate pair, which is no character") from None
    return ask
