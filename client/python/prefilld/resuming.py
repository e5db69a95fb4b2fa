"""The calls that a client makes beside the streams of a resumable request. See resumption.py and its proto."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import grpc
import grpc.aio

from prefilld.channels import Server
from prefilld.errors import PrefilldError
from prefilld.options import Call
from prefilld.resumption import MOMENT, PATIENCE, Names, Patience, is_worth_another_try
from prefilld.transfer import Reception

_OK = grpc.StatusCode.OK


class _Resumer:
    """Both kinds of clients have this for one request at one server."""

    def __init__(self, server: Server, call: Call, reception: Reception):
        request = call.request
        self._names = Names(request.request_id, request.resume_key, getattr(request, "receiver", 0))
        self._server = server
        self._stub = server.resumption()
        self._reception = reception
        self._patience: dict[int, Patience] = {}  # by lane
        self._under_way = False  # an acknowledgement
        self._over = False  # the server was told that nothing more is wanted

    def what_next(self, lane: int, ended: PrefilldError) -> tuple[str, float]:
        """Returns what Patience says of a stream that has broken, and seconds to wait before. Raises as it does."""
        patience = self._patience.setdefault(lane, Patience())
        what = patience.after(ended, self._reception.window, self._reception.progress)
        return what, patience.pause

    def resume(self, lane: int, timeout: float | None):
        """Attaches a lane again."""
        request = self._names.resume(lane, self._reception.received(lane))
        return self._server.resumption(lane).Resume(request, timeout=timeout)


class Resumer(_Resumer):
    """For the client that blocks. Thread-safe."""

    def __init__(self, server: Server, call: Call, reception: Reception):
        super().__init__(server, call, reception)
        self._lock = threading.Lock()
        self._last = None  # the call that said so

    def acknowledge(self) -> None:
        """Tells what has arrived, unless a call is under way, after which it will be told."""
        with self._lock:
            receipts = [] if self._under_way or self._over else self._reception.receipts.take()
            if not receipts:
                return
            self._under_way = True
        with contextlib.suppress(ValueError):  # the client was closed
            future = self._stub.Acknowledge.future(
                self._names.acknowledge(receipts), timeout=PATIENCE, wait_for_ready=True
            )
            future.add_done_callback(lambda answered: self._on_answer(answered.code(), receipts))

    def _on_answer(self, code: grpc.StatusCode, receipts: list) -> None:
        with self._lock:
            if is_worth_another_try(code) and not self._over:
                self._reception.receipts.put_back(receipts)
                again = threading.Timer(MOMENT, self._on_answer, (_OK, []))
                again.daemon = True
                return again.start()
            self._under_way = False
            if code is not _OK:
                self._over = True  # the streams tell why
        self.acknowledge()

    def end(self, whole: bool) -> None:
        """Says that everything is here, or that the request is no longer wanted; waits for nothing."""
        with self._lock:
            if self._last is not None:
                return
            self._over = True
            stub, names = self._stub, self._names
            with contextlib.suppress(ValueError):
                if whole:
                    self._last = stub.Acknowledge.future(names.acknowledge(complete=True), timeout=PATIENCE)
                else:
                    self._last = stub.Cancel.future(names.cancel(), timeout=PATIENCE)

    def await_end(self) -> None:
        """Waits until the server has heard of the end, for PATIENCE at most."""
        if self._last is not None:
            with contextlib.suppress(grpc.FutureCancelledError):  # the client was closed
                self._last.exception()


class AsyncResumer(_Resumer):
    """For asyncio."""

    def __init__(self, server: Server, call: Call, reception: Reception):
        super().__init__(server, call, reception)
        self._tasks: set[asyncio.Task] = set()  # asyncio itself keeps no reference to them

    def acknowledge(self) -> None:
        """As in Resumer."""
        if not self._under_way and not self._over:
            self._under_way = True
            self._start(self._tell())

    def _start(self, coroutine) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        try:
            while not self._over and (receipts := self._reception.receipts.take()):
                try:
                    await self._stub.Acknowledge(self._names.acknowledge(receipts), timeout=PATIENCE, wait_for_ready=True)
                except grpc.RpcError as error:
                    if not is_worth_another_try(error.code()):
                        self._over = True  # the streams tell why
                        return
                    self._reception.receipts.put_back(receipts)
                    await asyncio.sleep(MOMENT)
        except grpc.aio.UsageError:  # the client was closed
            self._over = True
        finally:
            self._under_way = False

    _ended = False

    def end(self, whole: bool) -> None:
        """As in Resumer."""
        if self._ended:
            return
        self._ended = self._over = True
        stub, names = self._stub, self._names
        self._start(self._say(stub.Acknowledge, names.acknowledge(complete=True)) if whole
                    else self._say(stub.Cancel, names.cancel()))  # fmt: skip

    @staticmethod
    async def _say(method, request) -> None:
        with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):
            await method(request, timeout=PATIENCE)

    async def await_end(self) -> None:
        """As in Resumer."""
        while self._tasks:
            await asyncio.wait(self._tasks)
