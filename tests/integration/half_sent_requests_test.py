#!/usr/bin/env python3
"""Strangers send half of large requests and open idle connections: memory stays bounded, and others are served.

Usage: half_sent_requests_test.py PREFILLD MODEL_FOLDER
"""

import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import time

IDLE_CONNECTIONS = 300
HALF_SENT_CONNECTIONS = 20
STREAMS = 22  # per connection
MESSAGE_BYTES = 4_000_000  # announced; half of it is sent
MAX_GROWTH_MB = 256 + 144  # the quota of gRPC's buffers, and what the allocator and 342 connections take
SECONDS = 8

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FIRST_WINDOW = 65535


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def request_headers(method: str) -> bytes:
    fields = [(":path", f"/prefill.v1.PrefillService/{method}"), (":authority", "test"), ("te", "trailers")]
    fields.append(("content-type", "application/grpc"))
    encoded = b"\x83\x86"  # :method POST, :scheme http
    for name, value in fields:
        encoded += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return encoded


class Http2:
    """One connection, with just as much of HTTP/2 as sending large requests takes."""

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

    def start(self, stream: int, method: str, announced: int, sent: int, ends: bool):
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
    """How long an honest caller waits for GetServerInfo on a connection of its own."""
    caller, started = Http2(port), time.monotonic()
    caller.start(1, "GetServerInfo", announced=0, sent=0, ends=True)
    while time.monotonic() - started < 20:
        caller.step()
        if len(caller.data.get(1, b"")) > 5:
            return time.monotonic() - started
        time.sleep(0.005)
    raise AssertionError("GetServerInfo was not answered within 20 s")


def check(port: int, pid: int):
    before = resident_mb(pid)
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(IDLE_CONNECTIONS)]
    senders = [Http2(port) for _ in range(HALF_SENT_CONNECTIONS)]
    for sender in senders:
        for i in range(STREAMS):
            sender.start(2 * i + 1, "Prefill", MESSAGE_BYTES, MESSAGE_BYTES // 2, ends=False)
    until, peak = time.monotonic() + SECONDS, before
    while time.monotonic() < until:
        for sender in senders:
            if sender.alive:
                sender.step()
        peak = max(peak, resident_mb(pid))
        time.sleep(0.001)
    waited = server_info_seconds(port)
    sent = HALF_SENT_CONNECTIONS * STREAMS * MESSAGE_BYTES // 2 - sum(sum(s.left.values()) for s in senders)
    print(
        f"{before} MB before, {peak} MB at most; {sum(s.ended for s in senders)} of"
        f" {HALF_SENT_CONNECTIONS * STREAMS} half-sent requests were ended; GetServerInfo took {waited:.2f} s;"
        f" about {sent // 1_000_000} MB were sent"
    )
    assert peak - before < MAX_GROWTH_MB, "requests in receipt take more memory than the server grants them"
    assert sum(s.ended for s in senders) > 0, "no request was ended: the test sent too little to reach the bound"
    for connection in idle:
        connection.close()


def main():
    prefilld, model = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as folder:
        ports = pathlib.Path(folder) / "ports"
        flags = [f"--model={model}", "--device=cpu", "--cpu_threads=1", "--max_prompt_tokens=1024"]
        flags += ["--listen=127.0.0.1:0", "--metrics_listen=", f"--port_file={ports}"]
        server = subprocess.Popen([prefilld, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while not ports.exists():
                assert server.poll() is None and time.monotonic() < until, "prefilld did not start"
                time.sleep(0.05)
            check(int(ports.read_text().split()[0].removeprefix("grpc=")), server.pid)
            assert server.poll() is None, "prefilld ended"
        finally:
            server.terminate()
            server.wait()


main()
