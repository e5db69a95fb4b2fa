"""The bodies of requests: read within bounds of size, time and memory, and parsed beside the event loop.

A router's prefill call has rules of its own. llm-d's sidecar decodes without prefilld where the answer has a code from
500 on, and gives codes below it to its client as they are. So a prefill call that breaks a limit of the gateway alone
gets none of them: one that is too large is answered like any whose prompt cannot be read, and one that comes too
slowly, or finds no room, gets 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from starlette.requests import Request

from prefilld.gateway.openai_requests import Ask, BadRequest, read_request

LARGE_BYTES = 256 << 10  # bodies and prompts above this wait for each other, and smaller ones do not wait for them
_SMALL_AT_ONCE = 4
_UNREADABLE = "the process that reads large bodies died; it is started again"
_MARK = re.compile(rb'(?<!\\)"do_remote_decode"\s{0,8}:\s{0,8}true')
_MARK_BYTES = 64  # the longest mark


class _Turns:
    """Gives work to threads or to a process, so many pieces at once.

    What waits for its turn waits in its own task and is gone with it: the queue of an executor would keep the prompts
    of clients that have left, in any number. Belongs to one event loop.
    """

    def __init__(self, at_once: int):
        self._free = asyncio.Semaphore(at_once)

    async def run(self, pool: Callable[[], Executor], work, *arguments) -> Any:
        """pool: is asked for the executor once it is this work's turn."""
        await self._free.acquire()
        try:
            running = pool().submit(work, *arguments)
        except BaseException:
            self._free.release()
            raise
        result = asyncio.wrap_future(running)
        loop = asyncio.get_running_loop()
        # Work whose task was cancelled runs to its end all the same, and the next waits for that.
        running.add_done_callback(lambda _: self._release(loop))
        return await result

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(self._free.release)


class SideThreads:
    """Threads for work that would hold up the event loop: some for small pieces, and one for large ones."""

    def __init__(self):
        self._small = ThreadPoolExecutor(_SMALL_AT_ONCE, thread_name_prefix="gateway-small")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="gateway-large")
        self._small_turns, self._large_turns = _Turns(_SMALL_AT_ONCE), _Turns(1)

    async def run(self, size: int, work, *arguments) -> Any:
        """size: of what is worked on, in bytes."""
        if size > LARGE_BYTES:
            return await self._large_turns.run(lambda: self._large, work, *arguments)
        return await self._small_turns.run(lambda: self._small, work, *arguments)


class ParsingProcess:
    """Reads large bodies in a process of its own: while Python reads JSON, nothing else of its process runs.

    It starts with the first such body, and again after it died. Belongs to one event loop.
    """

    def __init__(self):
        self._pool: ProcessPoolExecutor | None = None
        self._turns = _Turns(1)

    async def parse(self, body: bytearray, is_chat: bool) -> Ask:
        """Raises BadRequest."""
        try:
            return pickle.loads(await self._turns.run(self._open, _parse_large, body, is_chat))
        except BrokenProcessPool:
            broken, self._pool = self._pool, None  # before the next has its turn
            _let_go(broken)
            raise BadRequest(_UNREADABLE, status=503, code="unavailable") from None

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # A fork would have gRPC's threads and locks, without what they wait for.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, initializer=_live_as_long_as_the_gateway)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _let_go(broken: ProcessPoolExecutor | None) -> None:
    """Ends the thread that still writes a body for the dead process: the gateway's own end would wait for it.

    Python 3.11.5 and newer do that themselves (python/cpython#94777).
    """
    with contextlib.suppress(AttributeError):
        broken._call_queue._reader.close()


def _live_as_long_as_the_gateway() -> None:
    """Leaves signals, which may go to all processes of a service, to the gateway: it may still drain."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_gateway, daemon=True).start()


def _end_with_the_gateway() -> None:
    """A gateway that is killed closes nothing, and this process would wait for bodies for ever."""
    multiprocessing.parent_process().join()
    os._exit(0)


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
        """max_bytes: of one body. max_pending_bytes: of all whose prompts are no tokens yet. seconds: for one to come.

        has_answers: others than routers may ask; without, whatever cannot be read is taken for a prefill call.
        """
        self._threads = threads
        self._parser = parser
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.has_answers = has_answers
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0

    def open(self, request: Request, is_chat: bool) -> Body:
        """To be dropped by the caller."""
        return Body(self, request, is_chat)

    async def parse(self, data: bytearray, is_chat: bool) -> Ask:
        """Raises BadRequest."""
        if len(data) > LARGE_BYTES:
            return await self._parser.parse(data, is_chat)
        return await self._threads.run(len(data), _parse, data, is_chat)

    def take(self, num_bytes: int) -> None:
        """Counts bytes that a body keeps. Raises BadRequest where they are too many in all."""
        if self._pending_bytes + num_bytes > self._max_pending_bytes:
            message = f"bodies of {self._pending_bytes} bytes wait, at most {self._max_pending_bytes} may"
            raise BadRequest(message, status=503, code="overloaded")
        self._pending_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._pending_bytes -= num_bytes

    def is_too_large(self, num_bytes: int) -> bool:
        return num_bytes > self.max_bytes


class Body:
    """One body, from its first byte until its prompt has become tokens."""

    def __init__(self, bodies: Bodies, request: Request, is_chat: bool):
        self._bodies = bodies
        self._request = request
        self._is_chat = is_chat
        self._num_bytes = 0
        self._kept_bytes = 0
        self._data = bytearray()
        self._tail = b""
        self._is_whole = True
        self._has_mark = False  # it says that it is a prefill call

    @property
    def is_prefill_call(self) -> bool:
        """Tells what is known, or assumed, of a body that cannot be read."""
        return self._has_mark or not self._bodies.has_answers

    async def read(self) -> Ask:
        """Raises BadRequest."""
        try:
            await asyncio.wait_for(self._receive(), self._bodies.seconds)
        except asyncio.TimeoutError:  # before Python 3.11 it is no TimeoutError
            raise self._refusal(f"the body did not come within {self._bodies.seconds:g} s", 408) from None
        if not self._is_whole:
            return Ask(is_chat=self._is_chat, prompt=None, is_prefill_call=True)
        data, self._data = self._data, bytearray()
        return await self._bodies.parse(data, self._is_chat)

    def drop(self) -> None:
        """Gives its room to others. To be called once nobody has its content any more; more calls do nothing."""
        self._bodies.give_back(self._kept_bytes)
        self._kept_bytes = 0
        self._data = bytearray()

    async def _receive(self) -> None:
        """Reads to the end. A body that is too large is not kept, but read on, so that its sender hears the answer."""
        async for chunk in self._request.stream():
            self._num_bytes += len(chunk)
            self._look_for_mark(chunk)
            if self._is_whole and self._bodies.is_too_large(self._num_bytes):
                self.drop()
                self._is_whole = False
            elif self._is_whole:
                self._bodies.take(len(chunk))
                self._kept_bytes += len(chunk)
                self._data += chunk
        if not self._is_whole and not self._has_mark:
            raise self._refusal(f"the body has {self._num_bytes} bytes, allowed: {self._bodies.max_bytes}", 413)

    def _refusal(self, message: str, status: int) -> BadRequest:
        if self.is_prefill_call:
            return BadRequest(message, status=503, code="overloaded")
        return BadRequest(message, status=status)

    def _look_for_mark(self, chunk: bytes) -> None:
        if not self._has_mark:
            self._has_mark = _MARK.search(self._tail + chunk) is not None
            self._tail = (self._tail + chunk)[-_MARK_BYTES:]


def _parse(body: bytearray, is_chat: bool) -> Ask:
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
    return dataclasses.replace(ask, num_bytes=len(body))


def _parse_large(body: bytearray, is_chat: bool) -> bytes:
    """Returns the Ask as pickle writes it, from which texts and arrays are read at once, however long they are."""
    ask = _parse(body, is_chat)
    if reason := _reason_not_to_send(ask):
        if not ask.is_prefill_call:
            raise BadRequest(reason, "messages")
        ask = dataclasses.replace(ask, prompt=None, template={})
    return pickle.dumps(ask)


def _reason_not_to_send(ask: Ask) -> str:
    """Returns why the gateway cannot take what was read, or "": but for texts and arrays, each value costs it time."""
    if not ask.is_chat:
        return ""
    others = [{**message, "content": None} for message in ask.prompt or []]
    try:
        size = len(json.dumps([others, ask.template], ensure_ascii=False, separators=(",", ":")))
        pickle.dumps(ask)
    except RecursionError:
        return "the messages have values too deep within others"
    if size > LARGE_BYTES:
        return f"messages without content, and chat_template_kwargs, have {size} characters, allowed: {LARGE_BYTES}"
    return ""
