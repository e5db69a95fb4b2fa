"""A TCP proxy before a server that breaks connections on demand."""

from __future__ import annotations

import contextlib
import socket
import threading


class FaultyProxy:
    """Forwards to `target`. Each connection is cut, or stalls, once the server has sent `limit` bytes over it.

    faults: connections that fail so; later ones work. None: all.
    """

    def __init__(self, target: str, limit: int, stall: bool = False, faults: int | None = None):
        host, port = target.rsplit(":", 1)
        self._target, self._limit, self._stall, self._faults = (host, int(port)), limit, stall, faults
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        for opened in (self._listener, *self._sockets):
            _end(opened)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:  # closed, or the server is away
                return
            self._sockets += [client, server]
            self.connections += 1
            limit = self._limit if self._faults is None or self.connections <= self._faults else None
            threading.Thread(target=self._forward, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, limit), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data[:limit])
                if limit is not None and (limit := limit - len(data)) <= 0:
                    if self._stall:
                        self._closed.wait()
                    break
        _end(source)
        _end(sink)


def _end(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
    opened.close()
