"""The client of a resumable request acknowledges what it reads, and attaches streams again.

proto/prefill/v1/resumption.proto describes how. Nothing here makes a call.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import grpc

from prefilld import wire
from prefilld.errors import PrefilldError

_Code = grpc.StatusCode

PATIENCE = 3.0  # seconds that an acknowledgement may take before it is made again
MOMENT = 0.02  # seconds between one that failed and the next
_MAX_DAMAGED = 64  # of a lane, in one acknowledgement
_MAX_ATTEMPTS_BEFORE_ACCEPTED = 3
_MAX_STARTS = 3

# The end of a call that a broken connection may have, or a damaged message.
_CONNECTION = {_Code.UNAVAILABLE, _Code.CANCELLED, _Code.INTERNAL, _Code.UNKNOWN, _Code.DATA_LOSS}


def is_worth_another_try(code: grpc.StatusCode) -> bool:
    """Tells it of a call that acknowledges. A server that reads too many calls ends any of them for want of room."""
    return code in _CONNECTION or code in (_Code.DEADLINE_EXCEEDED, _Code.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class Names:
    """The names by which the server knows a resumable request, and who receives it."""

    request_id: str
    resume_key: str
    receiver: int

    def resume(self, lane: int, received: int):
        return wire.ResumeRequest(**vars(self), lane=lane, received=received)

    def acknowledge(self, lanes=(), complete: bool = False):
        return wire.AcknowledgeRequest(**vars(self), lanes=lanes, complete=complete)

    def cancel(self):
        return wire.CancelRequest(**vars(self))


class Receipts:
    """News of what has arrived, until they are told. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._news: dict[int, tuple[int, list[int]]] = {}  # by lane: received, damaged

    def note(self, lane: int, received: int, damaged: tuple[int, ...] = ()) -> None:
        with self._lock:
            before = self._news.get(lane, (0, []))
            self._news[lane] = (max(before[0], received), [*before[1], *damaged][:_MAX_DAMAGED])

    def take(self) -> list:
        """Returns the LaneReceipts of what is new."""
        with self._lock:
            news, self._news = self._news, {}
        return [wire.LaneReceipt(lane=lane, received=entry[0], damaged=entry[1]) for lane, entry in news.items()]

    def put_back(self, receipts) -> None:
        """Takes receipts back that were not heard."""
        for receipt in receipts:
            self.note(receipt.lane, receipt.received, tuple(receipt.damaged))


class Patience:
    """Decides what to do when a stream of one lane has broken, until the window has passed without anything new."""

    RESUME, START_ANEW = "resume", "start anew"

    def __init__(self):
        self._progress = None
        self._broken_at = 0.0
        self._attempts = 0
        self._starts = 0
        self._reason: PrefilldError | None = None

    @property
    def pause(self) -> float:
        """Seconds to wait before the stream is attached again."""
        return 0.0 if self._attempts < 2 else min(0.02 * 2 ** min(self._attempts - 2, 10), 0.2)

    def after(self, ended: PrefilldError, window: float | None, progress: int) -> str:
        """Returns RESUME or START_ANEW, or raises the reason to give up.

        window: seconds; None: the request is not accepted. progress: grows with everything new that arrives.
        """
        if self._progress != progress:
            self._progress, self._broken_at, self._attempts, self._reason = progress, time.monotonic(), 0, ended
        accepted = window is not None
        if self._attempts and ended.code in (_Code.NOT_FOUND, _Code.UNIMPLEMENTED):
            self._starts += 1
            if accepted or ended.code is _Code.UNIMPLEMENTED or self._starts > _MAX_STARTS:
                raise self._reason
            self._attempts = 0
            return self.START_ANEW
        heard_after_all = self._starts and not self._attempts and ended.code is _Code.ALREADY_EXISTS
        too_large = accepted and ended.code is _Code.RESOURCE_EXHAUSTED  # a damaged length
        if ended.code not in _CONNECTION and not heard_after_all and not too_large:
            raise ended
        if accepted:
            is_late = time.monotonic() - self._broken_at >= window
        else:
            is_late = self._attempts >= _MAX_ATTEMPTS_BEFORE_ACCEPTED
        if is_late:
            raise self._reason
        self._attempts += 1
        return self.RESUME
