"""The clients of a worker, one for each address. Nothing here needs vLLM."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import grpc

from prefilld.clients import PrefillClient

KEPT = 32  # clients that no load uses; each has a connection for each lane


class Connections:
    """Lends clients, and closes those that nobody has used for the longest time. Thread-safe."""

    def __init__(self, credentials: grpc.ChannelCredentials | None, kept: int = KEPT):
        self._credentials = credentials
        self._kept = kept
        self._lock = threading.Lock()  # of all below
        self._clients: dict[tuple[str, ...], PrefillClient] = {}  # in the order in which they were last asked for
        self._users: dict[tuple[str, ...], int] = {}  # loads that have the client now

    @contextlib.contextmanager
    def client(self, addresses: tuple[str, ...]) -> Iterator[PrefillClient]:
        """Lends the client of these addresses, which take the calls in turn."""
        with self._lock:
            client = self._clients.pop(addresses, None) or PrefillClient(addresses, credentials=self._credentials)
            self._clients[addresses] = client
            self._users[addresses] = self._users.get(addresses, 0) + 1
        try:
            yield client
        finally:
            for idle in self._give_back(addresses):
                idle.close()

    def close(self) -> None:
        """Ends all calls."""
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()

    def _give_back(self, addresses: tuple[str, ...]) -> list[PrefillClient]:
        """Returns the clients that are to be closed. Only one that no load uses is, because that ends its calls."""
        with self._lock:
            self._users[addresses] -= 1
            if not self._users[addresses]:
                del self._users[addresses]
            idle = [key for key in self._clients if key not in self._users]
            return [self._clients.pop(key) for key in idle[: max(0, len(idle) - self._kept)]]
