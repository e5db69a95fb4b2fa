"""Hands entries from threads that read a network to one that iterates."""

from __future__ import annotations

import collections
import threading


class Mailbox:
    """Holds at most `room` entries. Thread-safe."""

    def __init__(self, room: int):
        self._room = room
        self._changed = threading.Condition()
        self._entries: collections.deque = collections.deque()
        self._closed = False

    def put(self, entry) -> bool:
        """Waits for room; returns False when nobody takes entries any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._entries) < self._room)
            if not self._closed:
                self._entries.append(entry)
                self._changed.notify_all()
            return not self._closed

    def take(self, timeout: float | None = None):
        """Waits for an entry. Raises TimeoutError after `timeout` seconds without one, EOFError when it is closed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._entries or self._closed, timeout):
                raise TimeoutError
            if not self._entries:
                raise EOFError
            self._changed.notify_all()
            return self._entries.popleft()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
