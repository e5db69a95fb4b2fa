"""HTTP connections that may not wait for ever: uvicorn has a timer between requests, and none before them."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedHttp(H11Protocol):
    """Cuts a connection whose request does not come.

    The head of a request must be whole so many seconds after the connection was made or, on one that had a request
    before, after its first byte. What comes of a body whose request was answered already has as long.
    """

    def __init__(self, seconds: float, *arguments, **options):
        super().__init__(*arguments, **options)
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._stop()
        elif self._is_between_requests():
            self._stop()
            self._wait_for_the_next()
        elif self._timer is None:
            self._start()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        super().connection_lost(error)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_between_requests(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _wait_for_the_next(self) -> None:
        """Starts uvicorn's own timer, which the bytes that came have stopped."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _start(self) -> None:
        self._timer = self.loop.call_later(self._seconds, self._cut)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        self._timer = None
        if not self._is_answering() and not self.transport.is_closing():
            self.transport.close()
