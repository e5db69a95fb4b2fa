"""KvReceiver, to which prefilld pushes caches: for a decode worker that is told by a router what will come.

    with KvReceiver("0.0.0.0:50052") as receiver:
        with receiver.expect("transfer 7", tokens, layout=layout) as cache:
            ...  # whoever calls prefilld does so with deliver_to=Delivery("this.host:50052", "transfer 7")
            for blocks in cache:
                ...
            print(cache.result.first_token.token_id)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from prefilld import wire
from prefilld.errors import Cancelled, PrefilldError, data_loss
from prefilld.frames import Frame, read_event
from prefilld.mailbox import Mailbox
from prefilld.options import Layout
from prefilld.transfer import KvBlocks, TransferCheck, check_layout

_METHOD = "/prefill.v1.KvReceiver/Receive"
_ROOM = 4  # frames of a cache that wait to be taken; the sender waits for more
_Code = grpc.StatusCode


class ExpectedCache:
    """Iterates over the KvBlocks of one pushed cache. The sender is told that all is stored when the iteration ends.

    layout: the KvLayout message, once the first blocks are there. result: the PrefillResult message, without
    log-probabilities of the prompt, at the end. Leaving the `with` block ends the transfer.
    """

    def __init__(self, forget, request, timeout: float | None):
        self._forget = forget
        self._request = request  # a PrefillRequest with tokens, layout and fingerprint
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._mailbox = Mailbox(_ROOM)
        self._taken = threading.Lock()  # by the one stream that brings the cache
        self._ended = threading.Event()
        self._items = self._receive()
        self.layout: Any = None
        self.result: Any = None

    def __enter__(self) -> ExpectedCache:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._forget()
        self._mailbox.close()
        self._ended.set()

    def __iter__(self) -> Iterator[KvBlocks]:
        return self._items

    def _receive(self) -> Generator[KvBlocks, None, None]:
        try:
            while True:
                left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                try:
                    entry = self._mailbox.take(left)
                except TimeoutError:
                    raise PrefilldError(_Code.DEADLINE_EXCEEDED, "the pushed cache did not come in time") from None
                except EOFError:
                    raise Cancelled("the receiver was closed") from None
                if isinstance(entry, PrefilldError):
                    raise entry
                if not isinstance(entry, KvBlocks):
                    self.result = entry
                    return
                yield entry
        finally:
            self.close()

    def _take_stream(self, layout, messages: Iterator[bytes]) -> tuple[int, int]:
        """Hands on what a stream brings, in the stream's thread; returns bytes and frames once all is stored."""
        if not self._taken.acquire(blocking=False):
            raise PrefilldError(_Code.NOT_FOUND, "the cache comes on another stream")
        try:
            request = self._request
            check_layout(layout, request.layout, len(request.token_ids), request.model_fingerprint)
            self.layout = layout
            check, result, size, frames = TransferCheck(layout), None, 0, 0
            for data in messages:
                event = read_event(data, wire.ReceiveRequest)
                if isinstance(event, Frame):
                    if result is not None:
                        raise data_loss("a frame came after the result")
                    if not self._mailbox.put(check.take(event)):
                        raise Cancelled("the receiver no longer wants the cache")
                    size, frames = size + len(event.payload), frames + 1
                elif event.HasField("result"):
                    result = event.result
            if result is None:  # gRPC may end the messages of a sender that is gone, or raise an error
                raise PrefilldError(_Code.UNAVAILABLE, "the sender ended the transfer without a result")
            check.finish(result)
        except PrefilldError as error:
            self._mailbox.put(error)
            raise
        except Exception as error:  # the sender, or its connection, is gone
            gone = PrefilldError(_Code.UNAVAILABLE, f"the sender ended the transfer: {error}")
            self._mailbox.put(gone)
            raise gone from error
        if self._mailbox.put(result):
            self._ended.wait()
        if self.result is None:
            raise Cancelled("the receiver no longer wants the cache")
        return size, frames


class KvReceiver:
    """Takes the caches that were announced with expect(), and no others. Thread-safe."""

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        credentials: grpc.ServerCredentials | None = None,
        max_transfers: int = 16,
        open_timeout: float = 30,
    ):
        """Listens at once. Raises RuntimeError if the address is taken.

        listen: host:port; port 0 is any free one, which `address` tells. max_transfers: caches that are received at
        once; more wait. open_timeout: seconds after which a stream that names no transfer is ended.
        """
        self._expected: dict[str, ExpectedCache] = {}
        self._lock = threading.Lock()
        self._open_timeout = open_timeout
        options = (("grpc.max_receive_message_length", 64 << 20), ("grpc.http2.lookahead_bytes", 8 << 20))
        self._server = grpc.server(ThreadPoolExecutor(max_transfers, "prefilld-receive"), options=options)
        handler = grpc.stream_unary_rpc_method_handler(
            self._handle, response_serializer=wire.ReceiveResponse.SerializeToString
        )
        _, service, method = _METHOD.split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        if credentials is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, credentials)
        if port == 0:
            raise RuntimeError(f"{listen} cannot be listened at")
        self.address = f"{listen.rpartition(':')[0]}:{port}" if not listen.startswith("unix:") else listen
        self._server.start()

    def __enter__(self) -> KvReceiver:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends every transfer."""
        with self._lock:
            expected = list(self._expected.values())
        for cache in expected:
            cache.close()
        self._server.stop(None)

    def expect(
        self,
        transfer_id: str,
        tokens: Sequence[int],
        *,
        layout: Layout = Layout(),
        model_fingerprint: str = "",
        timeout: float | None = None,
    ) -> ExpectedCache:
        """Announces the cache of a prompt, before prefilld is called with the same tokens and layout.

        timeout: seconds until it must have come. Raises ValueError if the id is already expected.
        """
        request = wire.PrefillRequest(
            token_ids=tokens, layout=layout.to_wire(), model_fingerprint=model_fingerprint
        )

        def forget() -> None:
            with self._lock:
                if self._expected.get(transfer_id) is cache:
                    del self._expected[transfer_id]

        cache = ExpectedCache(forget, request, timeout)
        with self._lock:
            if transfer_id in self._expected:
                raise ValueError(f"transfer_id {transfer_id!r} is already expected")
            self._expected[transfer_id] = cache
        return cache

    def _handle(self, messages: Iterator[bytes], context: grpc.ServicerContext):
        slow = threading.Timer(self._open_timeout, context.cancel)
        slow.start()
        try:
            try:
                first = next(messages, None)
            finally:
                slow.cancel()
            opened = None if first is None else read_event(first, wire.ReceiveRequest)
            if opened is None or isinstance(opened, Frame) or not opened.HasField("open"):
                raise data_loss("the stream does not begin with ReceiveOpen")
            with self._lock:
                cache = self._expected.get(opened.open.transfer_id)
            if cache is None:
                raise PrefilldError(_Code.NOT_FOUND, f"nobody waits for transfer_id {opened.open.transfer_id!r}")
            size, frames = cache._take_stream(opened.open.layout, messages)
        except PrefilldError as error:
            context.abort(error.code, error.details)
        return wire.ReceiveResponse(kv_bytes=size, kv_frames=frames)
