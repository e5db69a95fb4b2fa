"""KvReceiver, to which prefilld pushes caches: for a decode worker that is told by a router what will come.

    with KvReceiver("0.0.0.0:50052") as receiver:
        with receiver.expect("transfer 7", tokens, layout=layout) as cache:
            ...  # whoever calls prefilld does so with deliver_to=Delivery("this.host:50052", "transfer 7")
            for blocks in cache:
                ...
            print(cache.result.first_token.token_id)
"""

from __future__ import annotations

import hmac
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
from prefilld.options import MAX_LANES, Layout
from prefilld.pushed_lanes import PushedLanes
from prefilld.transfer import KvBlocks, TransferCheck, check_layout

_SERVICE = "prefill.v1.KvReceiver"
_ROOM = 4  # frames of a cache that wait to be taken; the sender waits for more
_MAX_COMPLETE = 64  # complete caches that are remembered for senders whose connection broke at the end
_KEY_LENGTHS = range(32, 129)  # characters
# A sender whose machine vanished is noticed within half a minute, and those that ping every 20 s are not sent away:
# the settings of proto/wire/keep_alive.h.
_KEEP_ALIVE = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
_NOTICED_AFTER = 30.0  # seconds until a sender, whose settings are the same, knows that its connection is dead
_Code = grpc.StatusCode


class ExpectedCache:
    """Iterates over the KvBlocks of one pushed cache. The sender is told that all is stored when the iteration ends.

    layout: the KvLayout message, once the first blocks are there. result: the PrefillResult message, without
    log-probabilities of the prompt, at the end. Leaving the `with` block ends the transfer.
    """

    def __init__(self, forget, request, timeout: float | None, resume_window: float):
        self._forget = forget
        self._request = request  # a PrefillRequest with tokens, layout and fingerprint
        self._lanes = PushedLanes(resume_window, self._fail)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._mailbox = Mailbox(_ROOM)
        self._taken = threading.Lock()  # by the one stream that brings the cache, or by the first of its lanes
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
        self._lanes.close(cancel=self.result is None)

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

    def _fail(self, error: PrefilldError) -> None:
        self._mailbox.put(error)

    def _take_lane(self, opened, messages: Iterator[bytes], context) -> Iterator:
        """Yields the receipts of one stream of a lane, in the stream's thread. Its end is not the transfer's."""
        lane, lanes = opened.lane, self._lanes
        _check_lanes(opened)
        self._open_lane(opened, context)
        try:
            yield lanes.receipt(lane, complete=lane == 0 and self.result is not None)
            for data in messages:
                event = read_event(data, wire.ReceiveRequest)
                if isinstance(event, Frame):
                    damaged = lanes.take(event, lane, context, self._mailbox.put)
                    yield lanes.receipt(lane, damaged)
                elif event.HasField("result"):
                    self._finish(event.result, lane, context)
                    yield lanes.receipt(lane, complete=True)
                    return
        finally:
            lanes.leave(lane, context)

    def _open_lane(self, opened, context) -> None:
        """Takes a stream in. Whatever is wrong with the first of a cache ends the cache."""
        lanes, request = self._lanes, self._request
        with lanes.lock:
            if lanes.check is not None:
                if opened.layout != self.layout:
                    raise PrefilldError(_Code.INVALID_ARGUMENT, "layout: not the one of the transfer's first stream")
                return lanes.open(opened, context)
            if not self._taken.acquire(blocking=False):
                raise PrefilldError(_Code.NOT_FOUND, "the cache comes on another stream")
            try:
                check_layout(opened.layout, request.layout, len(request.token_ids), request.model_fingerprint)
                self.layout = opened.layout
                return lanes.open(opened, context)
            except PrefilldError as error:
                failure = error
            except Exception as error:  # there is no memory for it
                failure = PrefilldError(_Code.INTERNAL, f"the transfer cannot begin: {error!r}")
            self._taken.release()
        self._fail(failure)
        raise failure

    def _finish(self, result, lane: int, context) -> None:
        """Returns once the iteration has ended well."""
        try:
            self._lanes.check.finish(result)
        except PrefilldError as error:
            self._fail(error)
            raise
        if self._lanes.may_hand_on_result(lane, context):
            self._mailbox.put(result)
        self._lanes.await_end(lane, context)
        if self.result is None:
            raise Cancelled("the receiver no longer wants the cache")


def _check_lanes(opened) -> None:
    if not 1 <= opened.num_lanes <= MAX_LANES:
        raise PrefilldError(_Code.INVALID_ARGUMENT, f"num_lanes {opened.num_lanes}; from 1 to {MAX_LANES}")
    if opened.lane >= opened.num_lanes:
        raise PrefilldError(_Code.INVALID_ARGUMENT, f"lane {opened.lane}; num_lanes is {opened.num_lanes}")


class KvReceiver:
    """Takes the caches that were announced with expect(), and no others. Thread-safe."""

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        credentials: grpc.ServerCredentials | None = None,
        max_transfers: int = 16,
        open_timeout: float = 30,
        resume_window: float = 10,
    ):
        """Listens at once. Raises RuntimeError if the address is taken.

        listen: host:port; port 0 is any free one, which `address` tells. max_transfers: caches that are received at
        once, with 16 lanes each; more wait. open_timeout: seconds after which a stream that names no transfer is
        ended. resume_window: seconds that what has come is kept for a sender that lost its connection.
        """
        self._expected: dict[str, ExpectedCache] = {}
        self._lock = threading.Lock()
        # The caches that ended well and whose sender may not know it, and when: by id and key, the oldest first.
        self._complete: dict[tuple[str, str], tuple[ExpectedCache, float]] = {}
        self._open_timeout = open_timeout
        self._resume_window = resume_window
        self._remembered_for = _NOTICED_AFTER + resume_window
        sizes = (("grpc.max_receive_message_length", 64 << 20), ("grpc.http2.lookahead_bytes", 8 << 20))
        options = (*sizes, *_KEEP_ALIVE)
        self._server = grpc.server(ThreadPoolExecutor(max_transfers * MAX_LANES, "prefilld-receive"), options=options)
        handlers = {
            "Receive": grpc.stream_unary_rpc_method_handler(
                self._handle, response_serializer=wire.ReceiveResponse.SerializeToString
            ),
            "ReceiveLane": grpc.stream_stream_rpc_method_handler(
                self._handle_lane, response_serializer=wire.ReceiveReceipt.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
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
                    # Without a window no sender comes back.
                    may_be_asked = self._resume_window > 0 and cache._lanes.key is not None
                    if cache.result is not None and may_be_asked:
                        self._complete[transfer_id, cache._lanes.key] = cache, time.monotonic()
                    self._forget_old()

        cache = ExpectedCache(forget, request, timeout, self._resume_window)
        with self._lock:
            if transfer_id in self._expected:
                raise ValueError(f"transfer_id {transfer_id!r} is already expected")
            self._expected[transfer_id] = cache
        return cache

    def _forget_old(self) -> None:
        """Drops complete caches for which no sender comes back any more, or that are too many. Called with the lock."""
        until = time.monotonic() - self._remembered_for
        for name, (_, completed) in list(self._complete.items()):
            if completed > until and len(self._complete) <= _MAX_COMPLETE:
                return
            del self._complete[name]

    def _read_open(self, messages: Iterator[bytes], context: grpc.ServicerContext):
        """Returns the ReceiveOpen with which a stream begins."""
        slow = threading.Timer(self._open_timeout, context.cancel)
        slow.start()
        try:
            first = next(messages, None)
        finally:
            slow.cancel()
        opened = None if first is None else read_event(first, wire.ReceiveRequest)
        if opened is None or isinstance(opened, Frame) or not opened.HasField("open"):
            raise data_loss("the stream does not begin with ReceiveOpen")
        return opened.open

    def _cache(self, opened, key: str = "") -> ExpectedCache:
        """Returns the cache that a stream brings. A lane shows the key of the first stream."""
        with self._lock:
            # The id of a cache that is complete may be expected again.
            self._forget_old()
            complete, _ = self._complete.get((opened.transfer_id, key), (None, 0))
            cache = complete or self._expected.get(opened.transfer_id)
            if cache is None:
                raise PrefilldError(_Code.NOT_FOUND, f"nobody waits for transfer_id {opened.transfer_id!r}")
            if key and cache._lanes.key is None:
                cache._lanes.key = key
            if key and not hmac.compare_digest(key, cache._lanes.key):
                raise PrefilldError(_Code.PERMISSION_DENIED, "transfer_key: not the one of this transfer")
        return cache

    def _handle(self, messages: Iterator[bytes], context: grpc.ServicerContext):
        try:
            opened = self._read_open(messages, context)
            size, frames = self._cache(opened)._take_stream(opened.layout, messages)
        except PrefilldError as error:
            context.abort(error.code, error.details)
        return wire.ReceiveResponse(kv_bytes=size, kv_frames=frames)

    def _handle_lane(self, messages: Iterator[bytes], context: grpc.ServicerContext):
        try:
            opened = self._read_open(messages, context)
            key = opened.transfer_key
            if len(key) not in _KEY_LENGTHS or not key.isascii():
                raise PrefilldError(
                    _Code.INVALID_ARGUMENT, f"transfer_key has {len(key)} characters; 32 to 128, of ASCII"
                )
            yield from self._cache(opened, key)._take_lane(opened, messages, context)
        except PrefilldError as error:
            context.abort(error.code, error.details)
        except grpc.RpcError:
            return  # the sender, or its connection, is gone
