"""Connections to one server, or to several of one model that take the calls in turn."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence

import grpc

from prefilld import wire
from prefilld.bearer_token import BearerToken, check_is_safe
from prefilld.lanes import stands_for_several

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # a KV frame is 1 to 4 MiB, one large block can be more
    ("grpc.max_send_message_length", 64 << 20),  # a million token ids are 5 MiB
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.max_pings_without_data", 0),  # we send nothing during a long prefill
    ("grpc.use_local_subchannel_pool", 1),
    # A server that was away is called again within about 2 s of its return, not after up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the time of an attempt that nobody answers, in truth
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    ("grpc.lb_policy_name", "round_robin"),  # where an address stands for several servers
)

_LOOK_UP_SECONDS = 2.0  # between two look-ups of a name that has no address


class Server:
    """The connections to one address: one for each lane, opened when a call first needs it. Thread-safe."""

    def __init__(self, address: str, service: str, open_channel):
        self.address = address
        self._service = service
        self._open_channel = open_channel
        self._lock = threading.Lock()
        self._channels: list = []
        self._stubs: list[wire.Stub] = []
        self._nameless_since: float | None = None  # the name has no address
        self._has_one_lane: bool | None = None  # nobody has asked yet
        self.kv_bytes_per_token = 0  # of the last request that it accepted

    def stub(self, lane: int = 0) -> wire.Stub:
        return self._open(lane)[1]

    def resumption(self, lane: int = 0) -> wire.Stub:
        """Returns the methods of ResumptionService, on the connection of that lane."""
        return wire.Stub(self._open(lane)[0], "ResumptionService")

    def channel(self):
        """Returns the connection of lane 0, for calls of other services."""
        return self._open(0)[0]

    def _open(self, lane: int):
        with self._lock:
            if self._nameless_since is not None and time.monotonic() - self._nameless_since >= _LOOK_UP_SECONDS:
                self._nameless_since, self._channels, self._stubs = None, [], []
            while len(self._stubs) <= lane:
                channel = self._open_channel(self.address)
                self._channels.append(channel)
                self._stubs.append(wire.Stub(channel, self._service))
            return self._channels[lane], self._stubs[lane]

    def note_failure(self, details: str | None) -> None:
        """Looks at why a call failed, so that a later one does not fail for the same reason.

        A channel to a name that could not be resolved waits for up to two minutes before it looks
        again, and takes no setting for that; a new one looks at once. No call runs on the old one.
        """
        if "resolution failed" in (details or ""):
            with self._lock:
                if self._nameless_since is None:
                    self._nameless_since = time.monotonic()

    def has_one_lane(self) -> bool:
        """Tells whether a call may have one lane alone: connections may end at different servers, or a call showed it.

        It may wait for a name server when it is first asked.
        """
        if self._has_one_lane is None:
            self._has_one_lane = stands_for_several(self.address)
        return self._has_one_lane

    def note_one_lane(self) -> None:
        """Has later calls use one lane: lanes did end at another server, whatever the name says, or were refused."""
        self._has_one_lane = True

    def check_lanes(self, lanes: int) -> None:
        """Raises ValueError where the lanes of one call would reach different servers."""
        if lanes > 1 and "," in self.address:
            raise ValueError(
                f"address {self.address!r} stands for several servers, and all of {lanes} lanes must reach the same "
                "one: give a list of addresses"
            )

    def channels(self) -> list:
        with self._lock:
            return list(self._channels)


class Servers:
    """All addresses of a client. Thread-safe."""

    def __init__(
        self,
        address: str | Sequence[str],
        service: str,
        library,
        credentials: grpc.ChannelCredentials | None,
        use_proxy: bool,
        options: Sequence[tuple[str, object]],
        token_file: str | os.PathLike | None,
        token_without_tls: bool,
    ):
        """library: grpc or grpc.aio, whose channels are wanted."""
        arguments = (*_OPTIONS, ("grpc.enable_http_proxy", int(use_proxy)), *options)

        def open_channel(target: str):
            if credentials is None:
                return library.insecure_channel(target, arguments)
            return library.secure_channel(target, credentials, arguments)

        addresses = [address] if isinstance(address, str) else list(address)
        if not addresses:
            raise ValueError("no address of a server")
        self._token = None
        if token_file is not None:
            check_is_safe(addresses, credentials, token_without_tls)
            self._token = BearerToken(token_file)
        self._servers = [Server(a, service, open_channel) for a in addresses]
        self._turn = itertools.count()

    def metadata(self, metadata: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call, with the client's token if it has one."""
        return tuple(metadata) if self._token is None else self._token.added_to(metadata)

    def in_turn(self) -> list[Server]:
        """Returns the order in which a call tries the servers."""
        first = next(self._turn) % len(self._servers)
        return self._servers[first:] + self._servers[:first]

    def only(self) -> Server:
        """Returns the server of a client that has one."""
        if len(self._servers) != 1:
            raise ValueError(f"a client of {len(self._servers)} servers; make one of each for this")
        return self._servers[0]

    def check_single(self) -> None:
        """Raises ValueError where a call could reach another server than the one that is meant."""
        if len(self._servers) > 1 or "," in self._servers[0].address:
            addresses = ", ".join(server.address for server in self._servers)
            raise ValueError(f"a receiver attaches to the one server that has the request; this client has {addresses}")

    def channels(self) -> list:
        return [channel for server in self._servers for channel in server.channels()]
