"""One request over HTTP: its body, its limits, its answer whole or as a stream of events, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from prefilld.errors import PrefilldError
from prefilld.gateway.bodies import Bodies, Body
from prefilld.gateway.metrics import Metrics
from prefilld.gateway.openai_answers import Failure
from prefilld.gateway.openai_requests import Ask, BadRequest
from prefilld.gateway.service import Running, Service

logger = logging.getLogger("prefilld.gateway")

_HEARTBEAT_SECONDS = 5.0  # a stream is never silent for longer, so that idle time-outs of proxies do not hit it


@dataclass
class Door:
    """Limits, counts and the service, for all exchanges.

    max_requests, running: requests of all paths, from their first byte here until their answer's last.
    request_timeout_s: of a whole answer, queues included. closing: set when answers that still run must end.
    """

    service: Service
    metrics: Metrics
    bodies: Bodies
    max_requests: int
    request_timeout_s: float
    running: int = 0
    closing: asyncio.Event = field(default_factory=asyncio.Event)


class Exchange:
    """An ASGI application that answers one request."""

    def __init__(self, door: Door, is_chat: bool):
        self._door = door
        self._is_chat = is_chat
        self._route = "chat" if is_chat else "completions"
        self._arrival = time.monotonic()
        self._deadline = self._arrival + door.request_timeout_s
        self._events: _Events | None = None

    async def __call__(self, scope, receive, send) -> None:
        self._request, self._receive = Request(scope, receive), receive
        self._events = _Events(send)
        self._respond = lambda response: response(scope, receive, send)
        self._door.metrics.request_began()
        outcome = "500"
        try:
            outcome = await self._admit()
        finally:
            self._door.metrics.request_ended(self._route, outcome)

    async def _admit(self) -> str:
        """Returns the outcome, for metrics, as the others do."""
        if self._door.running >= self._door.max_requests:
            if not self._door.bodies.has_answers:  # what is asked elsewhere is known of no body that was not read
                self._route = "prefill_call"
            # A router's prefill call must not get a code below 500: it would fail instead of decoding without prefilld.
            message = f"the gateway answers {self._door.running} requests, as many as it may"
            return await self._fail(Failure(503, message, code="overloaded", retry_after=1))
        self._door.running += 1
        try:
            return await self._run()
        except BadRequest as error:
            return await self._fail(Failure.of(error))
        except PrefilldError as error:
            logger.warning("%s failed: %s", self._route, error)
            return await self._fail(Failure.of(error))
        except (ClientDisconnect, ConnectionError):
            return "cancelled"
        except Exception:
            logger.exception("%s failed", self._route)
            return await self._fail(Failure(500, "the gateway failed; its log says why"))
        finally:
            self._door.running -= 1

    async def _run(self) -> str:
        body = self._door.bodies.open(self._request, self._is_chat)
        try:
            return await self._run_with(body)
        finally:
            body.drop()

    async def _run_with(self, body: Body) -> str:
        try:
            answering = self._answer(await asyncio.wait_for(body.read(), self._left()), body)
        except asyncio.TimeoutError:  # before Python 3.11 it is no TimeoutError
            return await self._fail(self._lateness())
        except BadRequest:
            if body.is_prefill_call:
                self._route = "prefill_call"
            raise
        answering = asyncio.ensure_future(answering)
        leaving = asyncio.ensure_future(_left(self._receive))
        closing = asyncio.ensure_future(self._door.closing.wait())
        tasks = {answering, leaving, closing}
        try:
            await asyncio.wait(tasks, timeout=self._left(), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if leaving.done():
                return "cancelled"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._door.closing.is_set():
            return await self._fail(Failure(503, "the gateway shuts down", code="unavailable", retry_after=1))
        return await self._fail(self._lateness())

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _lateness(self) -> Failure:
        message = f"no answer within {self._door.request_timeout_s:g} s"
        return Failure(504, message, code="deadline_exceeded")

    async def _answer(self, ask: Ask, body: Body) -> str:
        if ask.is_prefill_call:
            self._route = "prefill_call"
            pointer = await self._door.service.point(ask, body.drop)
            await self._respond(JSONResponse(pointer.body))
            pointer.remember()
            return "ok"
        running = await self._door.service.answer(ask, body.drop, self._arrival, self._deadline)
        is_stream = ask.stream
        del ask  # and with it the text of the prompt, which nobody needs while the answer runs
        if is_stream:
            return await self._stream(running)
        async with contextlib.aclosing(running.pieces()) as pieces:
            text = "".join([piece async for piece in pieces])
        answer = running.form.whole(text, running.finish, running.usage)
        await self._respond(JSONResponse(answer, headers={"x-request-id": running.id}))
        return "ok"

    async def _stream(self, running: Running) -> str:
        """Answers with events. Errors before the first token, or the first heartbeat, still get their code of HTTP."""
        self._events.id = running.id
        first = running.form.first_event()
        async with contextlib.aclosing(_with_heartbeats(running.pieces())) as pieces:
            async for piece in pieces:
                if piece is None:
                    await self._events.heartbeat()
                    continue
                if first is not None:
                    await self._events.send(first)
                    first = None
                if piece:
                    await self._events.send(running.form.text_event(piece))
        for event in running.form.last_events(running.finish, running.usage):
            await self._events.send(event)
        await self._events.done()
        return "ok"

    async def _fail(self, failure: Failure) -> str:
        """Answers with an error, in the stream if there is one already."""
        if self._events.has_started:
            await self._events.send(failure.body())
            await self._events.end()
            return "stream_failed"
        headers = {} if failure.retry_after is None else {"retry-after": str(failure.retry_after)}
        if failure.status == 408:  # the rest of the body is not read
            headers["connection"] = "close"
        await self._respond(JSONResponse(failure.body(), failure.status, headers))
        return str(failure.status)


async def _left(receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Returns once the client is gone. The body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _with_heartbeats(pieces: AsyncGenerator[str, None]) -> AsyncGenerator[str | None, None]:
    """Yields the pieces, and None whenever none came for a while."""
    waiting: asyncio.Task | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(_next(pieces))
            done, _ = await asyncio.wait({waiting}, timeout=_HEARTBEAT_SECONDS)
            if not done:
                yield None
                continue
            piece, waiting = waiting.result(), None
            if piece is None:
                return
            yield piece
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await pieces.aclose()


async def _next(pieces: AsyncGenerator[str, None]) -> str | None:
    """Returns None at the end."""
    async for piece in pieces:
        return piece
    return None


class _Events:
    """A stream of server-sent events, which begins with the first of them."""

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]]):
        self._send = send
        self.id = ""
        self.has_started = False

    async def send(self, event: dict[str, Any]) -> None:
        await self._write(f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n")

    async def heartbeat(self) -> None:
        """Sends a comment, which readers of events skip."""
        await self._write(": waiting\n\n")

    async def done(self) -> None:
        await self._write("data: [DONE]\n\n")
        await self.end()

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, text: str) -> None:
        if not self.has_started:
            self.has_started = True
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            headers["x-request-id"] = self.id
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})
