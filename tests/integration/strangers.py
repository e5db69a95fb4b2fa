"""One HTTP/2 connection to a server of this build, with just as much of the protocol as a stranger needs.

It sends requests whole or in part, and gives the server all the room that it wants for answers.
"""

import pathlib
import socket
import struct
import subprocess
import tempfile
import time
from contextlib import contextmanager

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FIRST_WINDOW = 65535


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def request_headers(method: str) -> bytes:
    path = method if "/" in method else f"/prefill.v1.PrefillService/{method}"
    fields = [(":path", path), (":authority", "test"), ("te", "trailers")]
    fields.append(("content-type", "application/grpc"))
    encoded = b"\x83\x86"  # :method POST, :scheme http
    for name, value in fields:
        encoded += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return encoded


class Http2:
    """One connection. The owner calls step() again and again; nothing in it waits."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setblocking(False)
        self.out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
        self.received = b""
        self.window = FIRST_WINDOW
        self.windows: dict[int, int] = {}
        self.left: dict[int, int] = {}  # bytes to send, by stream
        self.data: dict[int, bytes] = {}
        self.ended = 0
        self.alive = True

    def call(self, stream: int, method: str, message: bytes):
        """Makes a whole call with a small request."""
        self.out += frame(HEADERS, END_HEADERS, stream, request_headers(method))
        body = b"\0" + struct.pack(">I", len(message)) + message
        self.out += frame(DATA, END_STREAM, stream, body)
        self.window -= len(body)
        self.left[stream] = 0
        self.windows[stream] = 0

    def start(self, stream: int, method: str, announced: int, sent: int, ends: bool = False):
        """Begins a call whose request is announced to be so long, and sends so much of it."""
        self.out += frame(HEADERS, END_HEADERS, stream, request_headers(method))
        self.out += frame(DATA, END_STREAM if ends else 0, stream, b"\0" + struct.pack(">I", announced))
        self.window -= 5
        self.windows[stream] = FIRST_WINDOW - 5
        self.left[stream] = sent

    def step(self):
        try:
            self._receive()
            self._fill()
            self.out = self.out[self.socket.send(self.out) :] if self.out else b""
        except BlockingIOError:
            pass
        except OSError:
            self.alive = False

    def _receive(self):
        try:
            bytes_read = self.socket.recv(1 << 16)
            self.alive = self.alive and len(bytes_read) > 0
            self.received += bytes_read
        except BlockingIOError:
            return
        while len(self.received) >= 9:
            length = int.from_bytes(self.received[:3], "big")
            if len(self.received) < 9 + length:
                return
            kind, flags = self.received[3], self.received[4]
            stream = int.from_bytes(self.received[5:9], "big")
            payload, self.received = self.received[9 : 9 + length], self.received[9 + length :]
            self._take(kind, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes):
        if kind == SETTINGS and not flags & ACK:
            self.out += frame(SETTINGS, ACK, 0)
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2], "big") == 4:  # the first window of streams
                    change = int.from_bytes(payload[at + 2 : at + 6], "big") - FIRST_WINDOW
                    self.windows = {key: window + change for key, window in self.windows.items()}
        elif kind == PING and not flags & ACK:
            self.out += frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE and stream == 0:
            self.window += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE and stream in self.windows:
            self.windows[stream] += int.from_bytes(payload, "big")
        elif kind == DATA:
            self.data[stream] = self.data.get(stream, b"") + payload
            if payload:  # what was read makes room for more
                self.out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload)))
                self.out += frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", len(payload)))
        if (kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM)) and stream in self.left:
            self.ended += 1
            del self.left[stream]

    def _fill(self):
        for stream in list(self.left):
            size = min(16384, self.window, self.windows[stream], self.left[stream])
            if size <= 0 or len(self.out) > 1 << 17:
                continue
            self.out += frame(DATA, 0, stream, b"\1" * size)
            self.window -= size
            self.windows[stream] -= size
            self.left[stream] -= size


def resident_mb(pid: int) -> int:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def server_info_seconds(port: int) -> float:
    """How long an honest caller waits for GetServerInfo on a connection of its own, asking again when it is refused."""
    started = time.monotonic()
    while time.monotonic() - started < 30:
        caller = Http2(port)
        caller.call(1, "GetServerInfo", b"")
        while caller.alive and caller.ended == 0 and time.monotonic() - started < 30:
            caller.step()
            time.sleep(0.005)
        if len(caller.data.get(1, b"")) > 5:
            return time.monotonic() - started
    raise AssertionError("GetServerInfo was not answered within 30 s")


@contextmanager
def running_prefilld(program: str, model: str, *flags: str):
    """Starts prefilld on free ports, gives (its process, its gRPC port, its metrics port), and checks that it lives."""
    with tempfile.TemporaryDirectory() as folder:
        ports = pathlib.Path(folder) / "ports"
        fixed = [f"--model={model}", "--device=cpu", "--cpu_threads=1", f"--port_file={ports}"]
        fixed += ["--listen=127.0.0.1:0", "--metrics_listen=127.0.0.1:0"]
        server = subprocess.Popen([program, *fixed, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while not ports.exists():
                assert server.poll() is None and time.monotonic() < until, "prefilld did not start"
                time.sleep(0.05)
            numbers = dict(line.split("=") for line in ports.read_text().split())
            yield server, int(numbers["grpc"]), int(numbers["metrics"])
            assert server.poll() is None, "prefilld ended"
        finally:
            server.terminate()
            server.wait()
