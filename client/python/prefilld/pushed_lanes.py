"""PushedLanes, which keeps the streams of one pushed cache apart, for KvReceiver."""

from __future__ import annotations

import threading
from typing import Any

import grpc

from prefilld import wire
from prefilld.errors import Cancelled, PrefilldError
from prefilld.frames import Frame
from prefilld.transfer import Damaged, TransferCheck


class PushedLanes:
    """The lanes of one pushed cache. A lane whose stream has broken waits `window` seconds for the next.

    A stream's thread may wait long for room in the mailbox. Meanwhile it holds no lock: its lane is busy. A stream that
    takes its place gets its first receipt at once. Only that stream's first frame waits for the lane, and the result
    for all lanes. Whoever waits here leaves when another stream has taken its place, so that a sender that tries again
    and again does not use up the threads.

    The order of locks: `lock`, then that of `check`. Nothing waits for the mailbox, or asks for KvReceiver's lock,
    while it holds either, and nobody who holds KvReceiver's asks for them.
    """

    def __init__(self, window: float, fail):
        self._window = window
        self._fail = fail  # called with the error when nobody comes back
        self.key: str | None = None  # of the first stream; KvReceiver's lock is its own
        self.lock = threading.Lock()  # of what follows
        self._changed = threading.Condition(self.lock)
        self.check: TransferCheck | None = None
        self._streams: list[Any] = []  # the context of each lane's stream, if it has one
        self._timers: list[threading.Timer | None] = []
        self._busy: set[int] = set()  # the lanes of which a frame is being checked and handed on
        self._has_result = False  # it is handed on, once
        self._is_over = False

    def open(self, opened, context) -> None:
        """Takes a stream in, in place of the one before. Called with the lock."""
        if self.check is None:
            self.check = TransferCheck(opened.layout, num_lanes=opened.num_lanes, resumable=True)
            self._streams = [None] * opened.num_lanes
            self._timers = [None] * opened.num_lanes
        if opened.num_lanes != len(self._streams):
            raise PrefilldError(
                grpc.StatusCode.INVALID_ARGUMENT, f"num_lanes {opened.num_lanes}; the transfer has {len(self._streams)}"
            )
        before, self._streams[opened.lane] = self._streams[opened.lane], context
        self._changed.notify_all()
        timer, self._timers[opened.lane] = self._timers[opened.lane], None
        if timer is not None:
            timer.cancel()
        if before is not None:
            before.cancel()

    def _await(self, condition, lane: int, context) -> None:
        """Waits for a condition, or raises ABORTED once the stream has lost its place. Called with the lock."""
        self._changed.wait_for(lambda: self._streams[lane] is not context or condition())
        if self._streams[lane] is not context:
            raise PrefilldError(grpc.StatusCode.ABORTED, "another stream has taken this one's place")

    def take(self, frame: Frame, lane: int, context, put) -> tuple[int, ...]:
        """Hands what a frame brings to put(), which may wait; returns its number if it is damaged."""
        with self.lock:
            self._await(lambda: lane not in self._busy, lane, context)
            self._busy.add(lane)
        try:
            blocks = self.check.take(frame, lane)
            if blocks is not None and not put(blocks):
                raise Cancelled("the receiver no longer wants the cache")
            return ()
        except Damaged:
            return (frame.sequence,)
        finally:
            with self.lock:
                self._busy.remove(lane)
                self._changed.notify_all()

    def receipt(self, lane: int, damaged: tuple[int, ...] = (), complete: bool = False):
        """Returns a receipt, without a wait. It counts a frame that is still being handed on."""
        return wire.ReceiveReceipt(received=self.check.received(lane), damaged=damaged, complete=complete)

    def may_hand_on_result(self, lane: int, context) -> bool:
        """Waits until every frame that has been counted is handed on, so that the result overtakes none.

        Called once all frames are counted. Returns whether the result, which may come again, was not here before.
        """
        with self.lock:
            self._await(lambda: not self._busy, lane, context)
            had_result, self._has_result = self._has_result, True
            return not had_result

    def await_end(self, lane: int, context) -> None:
        """Waits until the cache is closed."""
        with self.lock:
            self._await(lambda: self._is_over, lane, context)

    def leave(self, lane: int, context) -> None:
        """Takes the end of a stream."""
        gone = PrefilldError(
            grpc.StatusCode.UNAVAILABLE, f"the sender ended the transfer and did not come back in {self._window} s"
        )
        with self.lock:
            if self._streams[lane] is not context or self._is_over:
                return
            self._streams[lane] = None
            timer = self._timers[lane] = threading.Timer(self._window, self._fail, (gone,))
            timer.daemon = True
            timer.start()

    def close(self, cancel: bool) -> None:
        """Ends the waits for senders, and the streams too if they are of no use."""
        with self.lock:
            self._is_over = True
            self._changed.notify_all()
            timers, streams = list(self._timers), list(self._streams)
        for timer in timers:
            if timer is not None:
                timer.cancel()
        for stream in streams:
            if cancel and stream is not None:
                stream.cancel()
