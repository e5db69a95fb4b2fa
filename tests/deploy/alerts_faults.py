"""Ways to put a prefilld into trouble. Each is a function of a server that causes trouble until it is told to stop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import resource
import shutil
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import grpc
from alerts_processes import ROOT, Server
from dashboards_load import make_certificate

from prefilld import Attention, DecodeClient, Layout, PrefillClient, PrefilldError, wire

TEXT = [256, *(ROOT / "deploy" / "README.md").read_bytes()]


def set_fault(folder: Path, name: str, value: str = "") -> None:
    """Gives a fault to a server that has alerts_preloaded_faults.c preloaded."""
    (folder / f"{name}.new").write_text(value)
    (folder / f"{name}.new").rename(folder / name)


def send(client: PrefillClient, tokens: int, policy: str = "dense") -> None:
    """Sends a prompt and takes its answer, whatever it is."""
    with contextlib.suppress(PrefilldError), client.submit(TEXT[:tokens], attention=Attention(policy)) as stream:
        for _ in stream:
            pass


def send_many(server: Server, stop: threading.Event, tokens: int, pause: float) -> None:
    """Sends prompts without waiting for answers."""
    with PrefillClient(server.address) as client:
        streams = []
        while not stop.wait(pause):
            streams.append(client.submit(TEXT[:tokens], attention=Attention("dense")))
        for stream in streams:
            stream.cancel()


def load(server: Server, stop: threading.Event) -> None:
    """Is no trouble: prompts that the server can well do."""
    with PrefillClient(server.address) as client:
        while not stop.wait(0.3):
            send(client, 2000, "share")


def be_stopped(server: Server, stop: threading.Event) -> None:
    server.process.send_signal(signal.SIGSTOP)
    stop.wait()
    server.process.send_signal(signal.SIGCONT)


def restart(server: Server, stop: threading.Event) -> None:
    for _ in range(3):
        server.kill()
        server.start()
        server.wait_until_ready()
        if stop.wait(1.5):  # Prometheus must see each start
            return


def take_descriptors(server: Server, stop: threading.Event, left: int) -> None:
    """Lowers the process's limit of descriptors: those that are open stay, and so many more may be opened."""
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    stop.wait(1)
    in_use = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (in_use + left, hard))
    stop.wait()
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
    for connection in idle:
        connection.close()


def be_deaf(server: Server, stop: threading.Event, faults: Path) -> None:
    """Lets the port of gRPC accept nothing, while that of the metrics does."""
    set_fault(faults, "deaf_port", str(server.port))
    stop.wait()
    (faults / "deaf_port").unlink()


def stand_still(server: Server, stop: threading.Event, faults: Path) -> None:
    set_fault(faults, "stands_still")
    with PrefillClient(server.address) as client:
        stream = client.submit(TEXT[:300])
        stop.wait()
        (faults / "stands_still").unlink()
        stream.cancel()


def fail_device(server: Server, stop: threading.Event, faults: Path) -> None:
    set_fault(faults, "fails")
    with PrefillClient(server.address) as client:
        send(client, 300)
    server.process.wait(30)
    stop.wait()
    (faults / "fails").unlink()


def drain_slowly(server: Server, stop: threading.Event, faults: Path) -> None:
    """Lets the server drain while it computes a prompt for longer than half of --drain_timeout_s."""
    set_fault(faults, "slow_ms", "100")
    with PrefillClient(server.address) as client:
        stream = client.submit(TEXT[:600], attention=Attention("dense"))
        stream.wait_accepted()
        server.process.send_signal(signal.SIGTERM)
        stop.wait()
        stream.cancel()
    (faults / "slow_ms").unlink()


def be_slow(server: Server, stop: threading.Event, faults: Path) -> None:
    """Lets prompts come faster than the server computes them."""
    set_fault(faults, "slow_ms", "20")
    send_many(server, stop, tokens=256, pause=0.15)
    (faults / "slow_ms").unlink()


def take_nothing(server: Server, stop: threading.Event) -> None:
    """Is a consumer that takes nothing, again and again, until it is cut off."""
    with PrefillClient(server.address) as client:
        while not stop.is_set():
            stream = client.submit(TEXT[:2048], attention=Attention("dense"))
            stop.wait(3)
            stream.cancel()


def call_without_right(server: Server, stop: threading.Event) -> None:
    """Is a stranger to a server that takes calls of its tenants alone."""
    with PrefillClient(server.address) as client:
        while not stop.wait(0.2):
            send(client, 10)


def have_a_wrong_file(server: Server, stop: threading.Event, file: Path) -> None:
    """Lets somebody's slip get into the file of tenants."""
    right = file.read_text()
    file.write_text(right.replace("name", "nmae"))
    stop.wait()
    file.write_text(right)


def vanish(server: Server, stop: threading.Event) -> None:
    """Is many consumers of resumable requests, whose connections break and who do not come back."""
    with grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel:
        stub = wire.Stub(channel, "PrefillService")
        for number in itertools.count():
            call = stub.Prefill(wire.PrefillRequest(
                request_id=f"away {number}", resume_key="k" * 32, token_ids=TEXT[:2000],
                layout=wire.KvLayoutRequest(block_tokens=64)))  # fmt: skip
            with contextlib.suppress(grpc.RpcError):
                next(call), next(call)
            call.cancel()
            if stop.wait(0.5):
                return


def take_slowly(server: Server, stop: threading.Event) -> None:
    """Is two consumers behind a network that carries less than the server computes, however busy the machine is."""
    with SlowProxy(server.address) as proxy, PrefillClient(proxy.address) as client:

        def take() -> None:
            while not stop.is_set():
                with client.submit(TEXT[:2048], attention=Attention("dense")) as stream:
                    for _ in stream:
                        if stop.is_set():
                            break

        with concurrent.futures.ThreadPoolExecutor() as consumers:
            for consumer in [consumers.submit(take) for _ in range(2)]:
                consumer.result()


def let_certificate_expire(server: Server, stop: threading.Event, folder: Path) -> None:
    """Puts a certificate in place that has a day to live."""
    for old, new in zip((folder / "cert.pem", folder / "cert.key"), make_certificate(folder, days=1, name="new")):
        shutil.move(new, old)
    stop.wait()
    for old, new in zip((folder / "cert.pem", folder / "cert.key"), make_certificate(folder, days=90, name="new")):
        shutil.move(new, old)


def send_again(server: Server, stop: threading.Event) -> None:
    """Does nothing: the trouble comes from receive_damaged."""
    stop.wait()


def receive_damaged(worker: Server, stop: threading.Event) -> None:
    """Has a decode worker ask for caches, which come through a DamagingProxy."""
    with DecodeClient(worker.address) as client:
        while not stop.wait(0.2):
            with contextlib.suppress(PrefilldError):
                list(client.generate(TEXT[:1000], max_new_tokens=2))


class Proxy:
    """Forwards TCP to `target`, and does something to what comes back."""

    def __init__(self, target: str):
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._target)

    def _answers(self, server: socket.socket):
        """Yields what comes back, until the end."""
        raise NotImplementedError

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = self._connect()
            except OSError:
                return
            asked = iter(partial(client.recv, 65536), b"")
            threading.Thread(target=self._forward, args=(asked, client, server), daemon=True).start()
            threading.Thread(target=self._forward, args=(self._answers(server), server, client), daemon=True).start()

    @staticmethod
    def _forward(what, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for data in what:
                sink.sendall(data)
        for opened in (source, sink):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()


class DamagingProxy(Proxy):
    """Changes a byte of what comes back, one in more than DISTANCE."""

    DISTANCE = 300_000

    def _answers(self, server: socket.socket):
        left = self.DISTANCE
        while data := server.recv(65536):
            if len(data) > left:
                changed = bytearray(data)
                changed[left] ^= 1
                data, left = bytes(changed), self.DISTANCE
            else:
                left -= len(data)
            yield data


class SlowProxy(Proxy):
    """Brings back three quarters of a megabyte a second on each connection, and lets little wait in the sockets."""

    PIECE, PAUSE_S = 16384, 1 / 48

    def _connect(self) -> socket.socket:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * self.PIECE)  # before the connection
        server.connect(self._target)
        return server

    def _answers(self, server: socket.socket):
        while data := server.recv(self.PIECE):
            yield data
            time.sleep(self.PAUSE_S)
