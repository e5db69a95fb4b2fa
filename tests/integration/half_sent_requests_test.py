#!/usr/bin/env python3
"""Strangers send half of requests and open idle connections: memory stays bounded, and others are served.

Usage: half_sent_requests_test.py PREFILLD MODEL_FOLDER
"""

import resource
import selectors
import socket
import sys
import time
import urllib.request

from strangers import Http2, resident_mb, running_prefilld, server_info_seconds

MB = 1_000_000
ARRIVAL_SECONDS = 5  # the least that a server with a short --stall_timeout_s grants a request
# The bound that deploy/README.md states: gRPC's buffers of 256 MiB, and so much for each connection.
QUOTA_MB, CONNECTION_MB, CALL_MB = 269, 0.064, 0.066
READ_MB = 32 * 2  # of the large requests that are read at once


def metric(port: int, name: str) -> float:
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return float(next(line.split()[1] for line in page.splitlines() if line.startswith(name + " ")))


def step_all(connections: list[Http2], until: float, pid: int) -> int:
    """Runs the connections until then; returns the most memory that the process had, in MB."""
    peak = 0
    while time.monotonic() < until:
        for connection in connections:
            if connection.alive:
                connection.step()
        peak = max(peak, resident_mb(pid))
        time.sleep(0.001)
    return peak


def check_memory_of_large_requests(program: str, model: str):
    """20 connections send 22 requests each of which half of 4 MB arrives, beside 300 idle connections."""
    flags = ["--max_prompt_tokens=1024", "--stall_timeout_s=15"]
    with running_prefilld(program, model, *flags) as (server, port, _):
        before = resident_mb(server.pid)
        idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(300)]
        senders = [Http2(port) for _ in range(20)]
        for sender in senders:
            for i in range(22):
                sender.start(2 * i + 1, "Prefill", announced=4 * MB, sent=2 * MB)
        peak = step_all(senders, time.monotonic() + 8, server.pid)
        waited = server_info_seconds(port)
        sent = len(senders) * 22 * 2 - sum(sum(s.left.values()) for s in senders) // MB
        ended = sum(sender.ended for sender in senders)
        print(
            f"large requests: {before} MB before, {peak} MB at most; {ended} of {22 * len(senders)} were ended;"
            f" GetServerInfo took {waited:.2f} s; about {sent} MB were sent"
        )
        assert peak - before < READ_MB + 440 * CALL_MB + 64, "requests in receipt take more memory than is granted"
        assert ended > 0, "no request was ended for those that wait"
        assert waited < 3, "a caller of his own connection waited behind those who send half of requests"
        for connection in idle:
            connection.close()


class BusyCaller:
    """A connection that makes one call after another."""

    PROMPT = b"\x1a\x0a" + bytes(range(1, 11))  # PrefillRequest.token_ids of ten tokens

    def __init__(self, port: int, computes: bool):
        self.connection = Http2(port)
        self.method, self.message = ("Prefill", self.PROMPT) if computes else ("GetServerInfo", b"")
        self.stream = -1
        self.done = 0

    def step(self):
        self.connection.step()
        if self.stream not in self.connection.left:
            self.done += self.stream > 0
            self.connection.data.clear()
            self.stream += 2
            self.connection.call(self.stream, self.method, self.message)
            self.connection.step()


def check_two_thousand_idle(program: str, model: str):
    """2,000 idle connections, 300 busy ones, and 50 requests of every method that are sent in half."""
    flags = ["--max_prompt_tokens=1024", "--max_connections=3000", "--stall_timeout_s=1", "--queue_capacity=64"]
    with running_prefilld(program, model, *flags) as (server, port, metrics):
        before = resident_mb(server.pid)
        idle = [Http2(port) for _ in range(2000)]
        for connection in idle:
            connection.step()  # says that it speaks HTTP/2, and nothing from then on
        busy = [BusyCaller(port, computes=i < 20) for i in range(300)]
        methods = ["Prefill", "AttachLane", "AttachReceiver", "GetServerInfo", "/grpc.health.v1.Health/Check"]
        half = [Http2(port) for _ in range(50)]
        for i, connection in enumerate(half):
            connection.start(1, methods[i % len(methods)], announced=MB, sent=MB // 2)
        peak, late, started = 0, 0.0, time.monotonic()
        ready = selectors.DefaultSelector()
        for connection in [*busy, *half]:
            stepped = connection.connection if isinstance(connection, BusyCaller) else connection
            ready.register(stepped.socket, selectors.EVENT_READ, connection)
            connection.step()
        # The half requests end at their time; the busy connections go on until each was served again.
        while time.monotonic() - started < 40 and (late < len(half) or min(caller.done for caller in busy) < 2):
            until = time.monotonic() + 1
            while time.monotonic() < until:
                for key, _ in ready.select(timeout=0.1):
                    key.data.step()
                for connection in half:
                    connection.step()
            peak = max(peak, resident_mb(server.pid))
            late = metric(metrics, "prefilld_requests_late_total")
        took = time.monotonic() - started
        waited = server_info_seconds(port)
        done = sorted(caller.done for caller in busy)
        connections = metric(metrics, "prefilld_connections")
        bound = QUOTA_MB + CONNECTION_MB * 2350
        print(
            f"2,350 connections: {before} MB before, {peak} MB at most, {bound:.0f} MB more are granted;"
            f" {late:.0f} half-sent requests were ended within {took:.1f} s;"
            f" the busy connections made {sum(done)} calls, each {done[0]} at least; GetServerInfo took {waited:.2f} s"
        )
        assert peak - before < bound, "the connections take more memory than prefilld's limits say"
        assert late == len(half), "half-sent requests outlived their time"
        assert took > ARRIVAL_SECONDS - 1, "requests were ended before their time"
        until = time.monotonic() + 10
        while metric(metrics, "prefilld_requests_arriving") > 0:  # the gauge is half a second old
            assert time.monotonic() < until, "requests still arrive"
            time.sleep(0.1)
        assert all(connection.ended == 1 for connection in half), "a half-sent request was not told its end"
        assert done[0] > 1 and all(caller.connection.alive for caller in busy), "a busy connection was not served"
        assert connections >= 2300, f"{connections} connections are open"


def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    check_memory_of_large_requests(*sys.argv[1:3])
    check_two_thousand_idle(*sys.argv[1:3])


main()
