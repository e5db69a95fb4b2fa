"""PrefillClient and DecodeClient, which block. They are safe to use from several threads, one stream per thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from prefilld import wire
from prefilld.accepted import AcceptedFields
from prefilld.channels import Server, Servers
from prefilld.errors import PrefilldError, closed_is_cancelled, data_loss, one_family
from prefilld.mailbox import Mailbox
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
from prefilld.resuming import Resumer
from prefilld.resumption import Patience
from prefilld.tokens import Generation, Token
from prefilld.transfer import KvBlocks, Reception, WholeCache

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class _Client:
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
        """Connects lazily: a server that is not there fails the first call with UNAVAILABLE.

        address: host:port, or "unix:/path" on the same machine. A list names several servers of one
        model, which take the calls in turn; one that is away and has not accepted a call passes it on.
        credentials: grpc.ssl_channel_credentials(...) for TLS, None for plain text. use_proxy: go
        through the proxy that grpc_proxy, https_proxy or http_proxy names; otherwise they are
        ignored. options: more gRPC channel arguments. token_file: a file with a bearer token that is
        shown with each call and read again within two seconds of a change; ValueError in plain text, which
        credentials other than TLS may be too, but for Unix sockets, unless token_without_tls is set.
        """
        self._servers = Servers(
            address, self._service, grpc, credentials, use_proxy, options, token_file, token_without_tls
        )

    def close(self) -> None:
        """Ends every call still running."""
        for channel in self._servers.channels():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stream:
    """A response stream. Leaving its `with` block, or close(), cancels what is not finished."""

    _items: Generator

    def __init__(self):
        self._lock = threading.Lock()  # of the two below
        self._calls: list = []
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the call, from any thread and at any time; whoever iterates gets Cancelled."""
        with self._lock:
            self._cancelled = True
        self._end_calls()

    def close(self) -> None:
        """Ends what is not finished. For the thread that iterates."""
        self.cancel()
        self._items.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, call):
        """Adds a call to those that cancel() ends; returns it."""
        with self._lock:
            self._calls.append(call)
            is_cancelled = self._cancelled
        if is_cancelled:
            call.cancel()
        return call

    def _end_calls(self) -> None:
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _one_family(self):
        return one_family(lambda: self._cancelled)


_LANE_ENDED = object()


class PrefillStream(AcceptedFields, _Stream):
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
        self._resumers: list[Resumer] = []  # of the servers that were asked, if the request is resumable
        self._start()
        self._items = self._receive()

    def _start(self) -> None:
        """Calls the next server that has not been asked."""
        self._server = self._waiting.pop(0)
        self._lanes.choose(self._server)
        self._reception = Reception(self._call)
        if self._call.request.resume_key:
            self._resumers.append(Resumer(self._server, self._call, self._reception))
        self._lane0 = self._send()

    def _send(self):
        method = getattr(self._server.stub(), self._call.method)
        call = method(self._call.request, timeout=self._left(), metadata=self._metadata)
        self._begin(call)
        return call

    def _left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def wait_accepted(self) -> None:
        """Waits until a server has accepted the request. Raises PrefilldError if none does."""
        while self._reception.accepted is None:
            try:
                with self._one_family():
                    first = next(self._lane0, None)
                if first is None:
                    self._reception.finish()  # which raises
                self._reception.take(0, first)
            except PrefilldError as error:
                self._server.note_failure(error.details)
                try:
                    self._lane0 = self._again(0, self._lane0, error)
                except PrefilldError as last:
                    if self._lanes.ask_for_one(last):
                        self._waiting.insert(0, self._server)
                    else:
                        self._end(whole=False)  # this server may have heard the request all the same
                        if last.code is not grpc.StatusCode.UNAVAILABLE or not self._waiting:
                            raise
                    self._start()
        self._lanes.note_accepted(self._server, self._reception.accepted)

    def _again(self, lane: int, call, error: PrefilldError):
        """Attaches a broken lane again, or returns None if nothing of it is missing. Raises the error if it cannot."""
        call.cancel()
        if self._cancelled or not self._reception.may_resume:
            raise error
        if self._reception.result is not None:
            return None  # it comes when every lane has everything
        what, pause = self._resumers[-1].what_next(lane, error)
        time.sleep(pause)
        with closed_is_cancelled():
            if what is Patience.START_ANEW:
                return self._send()
            return self._begin(self._resumers[-1].resume(lane, self._left()))

    def _end(self, whole: bool) -> None:
        self._end_calls()
        if self._reception.receipts is not None:
            self._resumers[-1].end(whole)

    def cancel(self) -> None:
        super().cancel()
        self._end(self._whole)

    def close(self) -> None:
        super().close()
        for resumer in self._resumers:
            resumer.await_end()

    def __iter__(self) -> Iterator[KvBlocks]:
        return self._items

    def __next__(self) -> KvBlocks:
        return next(self._items)

    def read_all(self) -> np.ndarray:
        """Reads the whole cache into one array; WholeCache says of which shape."""
        self.wait_accepted()
        cache = WholeCache(self.layout)
        for blocks in self:
            cache.store(blocks)
        return cache.array

    def _receive(self) -> Generator[KvBlocks, None, None]:
        self.wait_accepted()
        try:
            one_lane = self._reception.accepted.num_lanes == 1
            for taken in self._read(0, self._lane0) if one_lane else self._read_lanes():
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

    def _read(self, lane: int, call) -> Iterator:
        while call is not None:
            try:
                with self._one_family():
                    for data in call:
                        taken = self._reception.take(lane, data)
                        if self._reception.receipts is not None:
                            self._resumers[-1].acknowledge()
                        if taken is not None:
                            yield taken
                if lane == 0 and self._reception.result is None:
                    raise data_loss("the stream ended without a result")
                return
            except PrefilldError as error:
                call = self._again(lane, call, error)

    def _read_lanes(self) -> Iterator:
        calls = [self._lane0]
        for attach in self._reception.attachments():
            calls.append(self._server.stub(attach.lane).AttachLane(attach, timeout=self._left()))
            self._begin(calls[-1])
        mailbox = Mailbox(2 * len(calls))

        def read(lane: int, call) -> None:
            try:
                for taken in self._read(lane, call):
                    if not mailbox.put(taken):
                        return
                mailbox.put(_LANE_ENDED)
            except Exception as error:
                mailbox.put(error)

        for lane, call in enumerate(calls):
            threading.Thread(target=read, args=(lane, call), name=f"prefilld-lane-{lane}", daemon=True).start()
        try:
            running = len(calls)
            while running:
                taken = mailbox.take()
                if taken is _LANE_ENDED:
                    running -= 1
                elif isinstance(taken, Exception):
                    raise taken
                else:
                    yield taken
        finally:
            mailbox.close()


class CacheUpdates(_Stream):
    """Iterates over the PrefixCacheUpdate messages of one server, for CachedBlocks.apply(). It never ends by itself.

    Iterating raises PrefilldError: ABORTED and UNAVAILABLE ask for a new call, with a new picture.
    """

    def __init__(self, server: Server, call):
        super().__init__()
        self._server = server
        self._begin(call)
        self._items = self._receive(call)

    def __iter__(self) -> Iterator[Any]:
        return self._items

    def __next__(self) -> Any:
        return next(self._items)

    def _receive(self, call) -> Generator:
        try:
            with self._one_family():
                yield from call
        except PrefilldError as error:
            self._server.note_failure(error.details)
            raise
        raise PrefilldError(grpc.StatusCode.UNAVAILABLE, "the stream of updates ended")


class PrefillClient(_Client):
    """The client of prefilld servers."""

    _service = "PrefillService"

    def server_info(self, timeout: float = 10) -> Any:
        """Returns the ServerInfo message: model, fingerprint, limits, policies, load."""
        servers = self._servers.in_turn()
        for server in servers:
            try:
                with one_family():
                    return server.stub().GetServerInfo(wire.GetServerInfoRequest(), timeout=timeout)
            except PrefilldError as error:
                server.note_failure(error.details)
                if error.code is not grpc.StatusCode.UNAVAILABLE or server is servers[-1]:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def watch_prefix_cache(
        self, *, token_ids: bool = False, metadata: Sequence[tuple[str, str]] = ()
    ) -> CacheUpdates:
        """Follows which blocks the server's prefix cache holds. ValueError: this is a client of several servers.

        token_ids: asks for the tokens of blocks, which come if the server's operator allows it. metadata: as in
        PrefillArguments.
        """
        server = self._servers.only()
        request = wire.WatchPrefixCacheRequest(token_ids=token_ids)
        return CacheUpdates(server, server.stub().WatchPrefixCache(request, metadata=self._servers.metadata(metadata)))

    def prefill(self, tokens: Sequence[int], **arguments: Unpack[PrefillArguments]) -> PrefillStream:
        """Runs one prompt; returns once the server has accepted it. PrefillArguments describes the arguments.

        Raises PrefilldError, here and while iterating, with the server's status, which PrefillService in
        prefill.proto lists; TransferError, which is one, when the server breaks its promise.
        """
        stream = self.submit(tokens, **arguments)
        stream.wait_accepted()
        return stream

    def submit(self, tokens: Sequence[int], **arguments: Unpack[PrefillArguments]) -> PrefillStream:
        """Sends one prompt and returns at once, so that the caller can cancel it while it waits to be accepted.

        PrefillStream.wait_accepted(), or iterating, waits for that.
        """
        return PrefillStream(self._servers, prefill_call(tokens, **arguments))

    def attach_receiver(
        self, request_id: str, receiver_key: str, receiver: int, num_tokens: int, **arguments: Unpack[ReceiverArguments]
    ) -> PrefillStream:
        """Receives a share of what prefill() of another client computes; returns at once, as submit() does.

        request_id, receiver_key: of that call. receiver: 1 to its `receivers` - 1, each once. num_tokens: of its
        prompt. The server waits 10 s for the call if it has not come. It must be the same server: ValueError for a
        client of several.
        """
        self._servers.check_single()
        call = receiver_call(request_id, receiver_key, receiver, num_tokens, **arguments)
        return PrefillStream(self._servers, call)


class GenerateStream(_Stream):
    """Iterates over Token as they are generated; result is the GenerateResult message after the last."""

    def __init__(self, server: Server, call, on_progress: Callable | None):
        super().__init__()
        self._server = server
        self._call = call
        self._begin(call)
        self._generation = Generation()
        self._on_progress = on_progress
        self._items = self._receive(call)

    @property
    def result(self) -> Any:
        return self._generation.result

    def wait_started(self) -> Any:
        """Waits until the worker has reserved room for the cache, and returns the GenerateStarted message.

        For before the iteration. A cache that is to be pushed may be sent from now on.
        """
        while self._generation.started is None:
            try:
                with self._one_family():
                    event = next(self._call, None)
            except PrefilldError as error:
                self._server.note_failure(error.details)
                raise
            if event is None:
                self._generation.finish()  # which raises
            self._generation.take(event)
        return self._generation.started

    def __iter__(self) -> Iterator[Token]:
        return self._items

    def __next__(self) -> Token:
        return next(self._items)

    def _receive(self, call) -> Generator[Token, None, None]:
        try:
            with self._one_family():
                for event in call:
                    taken = self._generation.take(event)
                    if isinstance(taken, Token):
                        yield taken
                    elif taken is not None and self._on_progress:
                        self._on_progress(taken)
        except PrefilldError as error:
            self._server.note_failure(error.details)
            raise
        self._generation.finish()


class DecodeClient(_Client):
    """The client of a decode worker, which has the prompt prefilled by a prefilld and generates."""

    _service = "DecodeService"

    def generate(
        self, tokens: Sequence[int], max_new_tokens: int, **arguments: Unpack[GenerateArguments]
    ) -> GenerateStream:
        """Starts one generation. GenerateArguments describes the arguments.

        Iterating raises PrefilldError: RESOURCE_EXHAUSTED when the worker lacks KV blocks, otherwise what
        prefilld answered (see PrefillService in prefill.proto).
        """
        call = generate_call(tokens, max_new_tokens, **arguments)
        (server, *_) = self._servers.in_turn()
        metadata = self._servers.metadata(call.metadata)
        started = server.stub().Generate(call.request, timeout=call.timeout, metadata=metadata)
        return GenerateStream(server, started, call.on_progress)
