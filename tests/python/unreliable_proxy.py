"""A TCP proxy that breaks connections and flips bits of what one side sends, as a test wants it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable

_DATA = 0  # an HTTP/2 frame
_PREFACE = 9  # bytes before the payload of an HTTP/2 frame


class DataFrames:
    """Finds the bytes of large HTTP/2 DATA frames in a stream that comes in pieces: KV, but for a few bytes."""

    def __init__(self, least: int, skip: int = 0):
        self._least = least
        self._left = skip  # bytes of the frame that are still to come
        self._head = b""

    def middles(self, piece: bytes) -> Iterable[int]:
        """Yields, for each large frame that ends its first half in this piece, a position in its middle."""
        at = 0
        while at < len(piece):
            if self._left:
                step = min(self._left, len(piece) - at)
                if self._middle is not None and self._left - step < self._middle <= self._left:
                    yield at + self._left - self._middle
                    self._middle = None
                self._left -= step
                at += step
                continue
            take = min(_PREFACE - len(self._head), len(piece) - at)
            self._head += piece[at : at + take]
            at += take
            if len(self._head) < _PREFACE:
                return
            size, kind = int.from_bytes(self._head[:3], "big"), self._head[3]
            self._head, self._left = b"", size
            self._middle = size // 2 if kind == _DATA and size >= self._least else None

    _middle: int | None = None


class UnreliableProxy:
    """Passes connections on to `target`. address: where it listens. Thread-safe.

    What the server sends suffers, or with `upwards` what the client sends.
    """

    def __init__(self, target: str, upwards: bool = False):
        self._upwards = upwards
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._lock = threading.Lock()
        self._cuts: list[int] = []
        self._flip_every = 0
        self._large_frames = 0
        self._open: list[socket.socket] = []
        self._is_silent = False
        self.cuts = self.flips = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> UnreliableProxy:
        return self

    def __exit__(self, *_) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()

    def cut_after(self, budgets: Iterable[int]) -> None:
        """Cuts the next connections, each after so many bytes of the suffering side; later ones stay."""
        with self._lock:
            self._cuts = list(budgets)

    def flip_every(self, large_frames: int) -> None:
        """Flips a bit in the middle of one in so many DATA frames that are 4 KiB or more. 0: none."""
        with self._lock:
            self._flip_every = large_frames

    def fall_silent(self) -> None:
        """Loses everything from now on, while the connections stay open: a machine that vanished."""
        self._is_silent = True

    def cut_all(self) -> None:
        with self._lock:
            sockets, self._open = self._open, []
        for entry in sockets:
            _reset(entry)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            for entry in (client, server):
                entry.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                budget = self._cuts.pop(0) if self._cuts else None
                self._open += [client, server]
            ways = ((client, server), (server, client)) if self._upwards else ((server, client), (client, server))
            threading.Thread(target=self._pass_unreliably, args=(*ways[0], budget), daemon=True).start()
            threading.Thread(target=self._pass, args=ways[1], daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(1 << 16):
                if not self._is_silent:
                    sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(sink)

    def _pass_unreliably(self, source: socket.socket, sink: socket.socket, budget: int | None) -> None:
        # A client's stream begins with the 24 bytes of HTTP/2's preface.
        frames = DataFrames(least=4096, skip=24 if self._upwards else 0)
        try:
            while piece := source.recv(1 << 16):
                if self._is_silent:
                    continue
                if self._flip_every:
                    piece = self._flip(piece, frames)
                if budget is not None and len(piece) >= budget:
                    sink.sendall(piece[:budget])
                    with self._lock:
                        self.cuts += 1
                    _reset(sink)
                    _reset(source)
                    return
                budget = None if budget is None else budget - len(piece)
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(sink)

    def _flip(self, piece: bytes, frames: DataFrames) -> bytes:
        damaged = bytearray(piece)
        for middle in frames.middles(piece):
            with self._lock:
                self._large_frames += 1
                if self._large_frames % self._flip_every:
                    continue
                self.flips += 1
            damaged[middle] ^= 1 << (self.flips % 8)
        return bytes(damaged)


def _reset(entry: socket.socket) -> None:
    """Closes a connection as a network does that has lost it: whoever uses it gets an error at once."""
    try:
        entry.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        entry.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    entry.close()
