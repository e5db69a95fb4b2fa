"""AsyncPrefillClient and AsyncDecodeClient, for asyncio. They belong to the event loop in which they are first used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np

from prefilld import wire
from prefilld.accepted import AcceptedFields
from prefilld.channels import Server, Servers
from prefilld.errors import Cancelled, PrefilldError, closed_is_cancelled, data_loss, from_rpc
from prefilld.lanes import LaneChoice
from prefilld.options import (
    Call,
    GenerateArguments,
    PrefillArguments,
    ReceiverArguments,
    generate_call,
    prefill_call,
    receiver_call,
)
from prefilld.resuming import AsyncResumer
from prefilld.resumption import Patience
from prefilld.tokens import Generation, Token
from prefilld.transfer import KvBlocks, Reception, WholeCache

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# A method of gRPC's own, without messages of ours: the empty request is about the whole server.
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}
_LOCALLY_CANCELLED = "Locally cancelled by application!"  # grpc.aio's own words


class _AsyncClient:
    _service: str

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None = None,
        use_proxy: bool = False,
        options: Sequence[tuple[str, object]] = (),
        token_file: str | os.PathLike | None = None,
        token_without_tls: bool = False,
    ):
        """Takes what PrefillClient takes."""
        self._servers = Servers(
            address, self._service, grpc.aio, credentials, use_proxy, options, token_file, token_without_tls
        )
        self._streams: weakref.WeakSet[_AsyncStream] = weakref.WeakSet()  # that a caller still has

    def _begun(self, stream: Any) -> Any:
        """Has close() end this stream; returns it."""
        self._streams.add(stream)
        return stream

    async def close(self) -> None:
        """Ends every call still running, and waits 3 s at most for servers; whoever iterates gets Cancelled."""
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        try:
            await asyncio.gather(*(stream._await_end() for stream in streams))
        finally:
            await asyncio.gather(*(channel.close() for channel in self._servers.channels()))

    async def is_serving(self, timeout: float = 10) -> bool:
        """Asks the server's health service (grpc.health.v1), which says no from the moment that the server drains.

        Raises PrefilldError when no answer comes.
        """
        (server, *_) = self._servers.in_turn()
        try:
            return await server.channel().unary_unary(_HEALTH_CHECK)(b"", timeout=timeout) == _SERVING
        except grpc.RpcError as error:
            server.note_failure(error.details())
            raise from_rpc(error, cancelled=False) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _AsyncStream:
    """A response stream. Leaving its `async with` block, or cancel(), ends what is not finished."""

    _items: AsyncGenerator

    def __init__(self):
        self._calls: list = []
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the call at any time; whoever iterates gets Cancelled."""
        self._cancelled = True
        self._end_calls()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        await self._items.aclose()
        await self._await_end()

    async def _await_end(self) -> None:
        """Waits until the server has heard of the end, where it has to be told."""

    def _end_calls(self) -> None:
        for call in self._calls:
            call.cancel()

    async def _read(self, call):
        """Returns the next message of a call, or None at its end."""
        if self._cancelled:
            raise Cancelled()
        try:
            message = await call.read()
        except grpc.RpcError as error:
            raise from_rpc(error, self._cancelled) from error
        except asyncio.CancelledError:  # of the call, by whomever, or of the task that reads it
            if self._cancelled:
                raise Cancelled() from None
            if call.done() and await call.details() != _LOCALLY_CANCELLED:
                raise PrefilldError(grpc.StatusCode.UNAVAILABLE, "the server cancelled the call") from None
            raise
        return None if message is grpc.aio.EOF else message


class AsyncPrefillStream(AcceptedFields, _AsyncStream):
    """Iterates over KvBlocks as the server computes them, layer by layer; with several lanes, in any order."""

    def __init__(self, servers: Servers, call: Call):
        super().__init__()
        self._call = call
        self._metadata = servers.metadata(call.metadata)
        self._deadline = None if call.timeout is None else time.monotonic() + call.timeout
        self._waiting = servers.in_turn()
        for server in self._waiting:
            server.check_lanes(call.request.num_lanes)
        self._lanes = LaneChoice(call)
        self._resumers: list[AsyncResumer] = []  # of the servers that were asked, if the request is resumable
        self._start()
        self._items = self._receive()

    def _start(self) -> None:
        """Calls the next server that has not been asked."""
        self._server = self._waiting.pop(0)
        self._lanes.choose(self._server)
        self._reception = Reception(self._call)
        if self._call.request.resume_key:
            self._resumers.append(AsyncResumer(self._server, self._call, self._reception))
        self._lane0 = self._send()

    def _send(self):
        method = getattr(self._server.stub(), self._call.method)
        call = method(self._call.request, timeout=self._left(), metadata=self._metadata)
        self._calls.append(call)
        return call

    def _left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def wait_accepted(self) -> None:
        """Waits until a server has accepted the request. Raises PrefilldError if none does."""
        while self._reception.accepted is None:
            try:
                first = await self._read(self._lane0)
                if first is None:
                    self._reception.finish()  # which raises
                self._reception.take(0, first)
            except PrefilldError as error:
                self._server.note_failure(error.details)
                try:
                    self._lane0 = await self._again(0, self._lane0, error)
                except PrefilldError as last:
                    if self._lanes.ask_for_one(last):
                        self._waiting.insert(0, self._server)
                    else:
                        self._end(whole=False)  # this server may have heard the request all the same
                        if last.code is not grpc.StatusCode.UNAVAILABLE or not self._waiting:
                            raise
                    self._start()
        # A later call may ask for several lanes, and must not wait for a name server in the event loop.
        await asyncio.to_thread(self._server.has_one_lane)
        self._lanes.note_accepted(self._server, self._reception.accepted)

    async def _again(self, lane: int, call, error: PrefilldError):
        """As PrefillStream._again."""
        call.cancel()
        if self._cancelled or not self._reception.may_resume:
            raise error
        if self._reception.result is not None:
            return None
        what, pause = self._resumers[-1].what_next(lane, error)
        await asyncio.sleep(pause)
        with closed_is_cancelled():
            if what is Patience.START_ANEW:
                return self._send()
            again = self._resumers[-1].resume(lane, self._left())
        self._calls.append(again)
        return again

    def _end(self, whole: bool) -> None:
        self._end_calls()
        if self._reception.receipts is not None:
            self._resumers[-1].end(whole)

    def cancel(self) -> None:
        super().cancel()
        self._end(self._whole)

    async def _await_end(self) -> None:
        for resumer in self._resumers:
            await resumer.await_end()

    def __aiter__(self) -> AsyncIterator[KvBlocks]:
        return self._items

    async def __anext__(self) -> KvBlocks:
        return await self._items.__anext__()

    async def read_all(self) -> np.ndarray:
        """Reads the whole cache into one array; WholeCache says of which shape."""
        await self.wait_accepted()
        cache = WholeCache(self.layout)
        async for blocks in self:
            cache.store(blocks)
        return cache.array

    async def _receive(self) -> AsyncGenerator[KvBlocks, None]:
        await self.wait_accepted()
        try:
            one_lane = self._reception.accepted.num_lanes == 1
            async with contextlib.aclosing(
                self._read_lane(0, self._lane0) if one_lane else self._read_lanes()
            ) as lanes:
                async for taken in lanes:
                    if isinstance(taken, KvBlocks):
                        yield taken
                    elif self._call.on_progress:
                        self._call.on_progress(taken)
            self._reception.finish()
            self._whole = True
        except PrefilldError as error:
            self._lanes.note_failure(self._server, error)
            raise
        finally:
            self._end(self._whole)

    async def _read_lane(self, lane: int, call) -> AsyncGenerator:
        while call is not None:
            try:
                while (data := await self._read(call)) is not None:
                    taken = self._reception.take(lane, data)
                    if self._reception.receipts is not None:
                        self._resumers[-1].acknowledge()
                    if taken is not None:
                        yield taken
                if lane == 0 and self._reception.result is None:
                    raise data_loss("the stream ended without a result")
                return
            except PrefilldError as error:
                call = await self._again(lane, call, error)

    async def _read_lanes(self) -> AsyncGenerator:
        calls = [self._lane0]
        for attach in self._reception.attachments():
            calls.append(self._server.stub(attach.lane).AttachLane(attach, timeout=self._left()))
            self._calls.append(calls[-1])
        arrived: asyncio.Queue = asyncio.Queue(2 * len(calls))

        async def read(lane: int, call) -> None:
            try:
                async for taken in self._read_lane(lane, call):
                    await arrived.put(taken)
                await arrived.put(None)
            except Exception as error:
                await arrived.put(error)

        readers = [asyncio.ensure_future(read(lane, call)) for lane, call in enumerate(calls)]
        try:
            running = len(calls)
            while running:
                taken = await arrived.get()
                if taken is None:
                    running -= 1
                elif isinstance(taken, Exception):
                    raise taken
                else:
                    yield taken
        finally:
            for reader in readers:
                reader.cancel()


class AsyncCacheUpdates(_AsyncStream):
    """Iterates over the PrefixCacheUpdate messages of one server, as CacheUpdates does."""

    def __init__(self, server: Server, call):
        super().__init__()
        self._server = server
        self._calls.append(call)
        self._items = self._receive(call)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    async def __anext__(self) -> Any:
        return await self._items.__anext__()

    async def _receive(self, call) -> AsyncGenerator:
        try:
            while (update := await self._read(call)) is not None:
                yield update
        except PrefilldError as error:
            self._server.note_failure(error.details)
            raise
        raise PrefilldError(grpc.StatusCode.UNAVAILABLE, "the stream of updates ended")


class AsyncPrefillClient(_AsyncClient):
    """The client of prefilld servers."""

    _service = "PrefillService"

    async def server_info(self, timeout: float = 10) -> Any:
        """Returns the ServerInfo message: model, fingerprint, limits, policies, load."""
        servers = self._servers.in_turn()
        for server in servers:
            try:
                return await server.stub().GetServerInfo(wire.GetServerInfoRequest(), timeout=timeout)
            except grpc.RpcError as error:
                server.note_failure(error.details())
                if error.code() is not grpc.StatusCode.UNAVAILABLE or server is servers[-1]:
                    raise from_rpc(error, cancelled=False) from error
        raise AssertionError("the last attempt returns or raises")

    def watch_prefix_cache(
        self, *, token_ids: bool = False, metadata: Sequence[tuple[str, str]] = ()
    ) -> AsyncCacheUpdates:
        """Follows which blocks the server's prefix cache holds. All is as in PrefillClient.watch_prefix_cache."""
        server = self._servers.only()
        request = wire.WatchPrefixCacheRequest(token_ids=token_ids)
        call = server.stub().WatchPrefixCache(request, metadata=self._servers.metadata(metadata))
        return self._begun(AsyncCacheUpdates(server, call))

    async def prefill(self, tokens: Sequence[int], **arguments: Unpack[PrefillArguments]) -> AsyncPrefillStream:
        """Runs one prompt; returns once the server has accepted it. All else is as in PrefillClient.prefill."""
        stream = self.submit(tokens, **arguments)
        try:
            await stream.wait_accepted()
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    def submit(self, tokens: Sequence[int], **arguments: Unpack[PrefillArguments]) -> AsyncPrefillStream:
        """Sends one prompt and returns at once, so that the caller can cancel it while it waits to be accepted.

        AsyncPrefillStream.wait_accepted(), or iterating, waits for that.
        """
        return self._begun(AsyncPrefillStream(self._servers, prefill_call(tokens, **arguments)))

    def attach_receiver(
        self, request_id: str, receiver_key: str, receiver: int, num_tokens: int, **arguments: Unpack[ReceiverArguments]
    ) -> AsyncPrefillStream:
        """Receives a share of what prefill() of another client computes, as PrefillClient.attach_receiver does."""
        self._servers.check_single()
        call = receiver_call(request_id, receiver_key, receiver, num_tokens, **arguments)
        return self._begun(AsyncPrefillStream(self._servers, call))


class AsyncGenerateStream(_AsyncStream):
    """Iterates over Token as they are generated; result is the GenerateResult message after the last."""

    def __init__(self, server: Server, call, on_progress: Callable | None):
        super().__init__()
        self._server = server
        self._call = call
        self._calls.append(call)
        self._generation = Generation()
        self._on_progress = on_progress
        self._items = self._receive(call)

    @property
    def result(self) -> Any:
        return self._generation.result

    async def wait_started(self) -> Any:
        """Waits until the worker has reserved room for the cache, and returns the GenerateStarted message.

        For before the iteration. A cache that is to be pushed may be sent from now on.
        """
        while self._generation.started is None:
            try:
                event = await self._read(self._call)
            except PrefilldError as error:
                self._server.note_failure(error.details)
                raise
            if event is None:
                self._generation.finish()  # which raises
            self._generation.take(event)
        return self._generation.started

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._items

    async def _receive(self, call) -> AsyncGenerator[Token, None]:
        try:
            while (event := await self._read(call)) is not None:
                taken = self._generation.take(event)
                if isinstance(taken, Token):
                    yield taken
                elif taken is not None and self._on_progress:
                    self._on_progress(taken)
        except PrefilldError as error:
            self._server.note_failure(error.details)
            raise
        self._generation.finish()


class AsyncDecodeClient(_AsyncClient):
    """The client of a decode worker, which has the prompt prefilled by a prefilld and generates."""

    _service = "DecodeService"

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, **arguments: Unpack[GenerateArguments]
    ) -> AsyncGenerateStream:
        """Starts one generation. All else is as in DecodeClient.generate."""
        call = generate_call(tokens, max_new_tokens, **arguments)
        (server, *_) = self._servers.in_turn()
        metadata = self._servers.metadata(call.metadata)
        started = server.stub().Generate(call.request, timeout=call.timeout, metadata=metadata)
        return self._begun(AsyncGenerateStream(server, started, call.on_progress))
