"""How many lanes a call asks for when its caller has not said: the rule of proto/wire/lane_count.h."""

from __future__ import annotations

import ipaddress
import socket

import grpc

from prefilld import wire
from prefilld.arrays import NUMPY_DTYPES
from prefilld.errors import PrefilldError

# One lane carries 2 to 3 GB/s. KV of this size or more gets four lanes, which carry up to three times that.
_BYTES_FOR_MANY = 8 << 20
_MANY = 4

_REFUSALS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)


def choose_lanes(kv_bytes: int) -> int:
    """Returns the number of lanes for so many bytes of KV; 0: nobody knows how many."""
    return 1 if kv_bytes < _BYTES_FOR_MANY else _MANY


def kv_bytes_per_token(layout) -> int:
    """Returns the bytes of KV that a token has in a transfer of this layout, over all layers."""
    vectors = 2 * layout.num_layers * layout.num_heads
    elements = vectors * layout.head_dim * NUMPY_DTYPES[wire.enum_name("DType", layout.dtype)].itemsize
    scales = {"per_token": 4 * vectors, "per_block": 4 * vectors // max(1, layout.block_tokens)}
    return elements + (scales[wire.enum_name("KvScales", layout.scales)] if layout.scales else 0)


def stands_for_several(address: str) -> bool:
    """Tells whether connections to the address may end at different servers. It may ask a name server."""
    if "," in address:
        return True
    if address.startswith(("unix", "ipv4:", "ipv6:")):
        return False
    host = address.removeprefix("dns:").rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        ipaddress.ip_address(host)
        return False
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False  # nobody can be called there
    families = [family for family, *_ in found]  # a machine may have an address of each
    return any(families.count(family) > 1 for family in set(families))


class LaneChoice:
    """The lanes of one call. Where its caller left them open, they are chosen for the server that is asked.

    What a token's KV takes is known from what the server accepted before; until then one lane is asked for.
    """

    def __init__(self, call):
        self._request = call.request
        self._is_open = call.request.num_lanes == 0
        if call.method == "Prefill" and (call.request.HasField("deliver_to") or call.request.pushes):
            self._is_open = False  # nothing comes here
        layout = call.request.layout
        self._tokens = max(0, call.num_tokens - layout.first_block * layout.block_tokens)
        self._was_refused = False

    def choose(self, server) -> None:
        """Must be called before the request is sent to a server."""
        if not self._is_open:
            return
        lanes = 1 if self._was_refused else choose_lanes(self._tokens * server.kv_bytes_per_token)
        self._request.num_lanes = 1 if lanes > 1 and server.has_one_lane() else lanes

    def ask_for_one(self, refusal: PrefilldError) -> bool:
        """Tells whether to ask once more: the server, or the caller's tenant, may have fewer lanes than were chosen."""
        if not self._is_open or self._request.num_lanes == 1 or refusal.code not in _REFUSALS:
            return False
        self._was_refused = True
        return True

    def note_failure(self, server, failure: PrefilldError) -> None:
        """Takes the end of a call that was accepted. Lanes that found nobody who knows it ended at another server."""
        if self._is_open and self._request.num_lanes > 1 and failure.code is grpc.StatusCode.NOT_FOUND:
            server.note_one_lane()

    def note_accepted(self, server, accepted) -> None:
        if self._was_refused:
            server.note_one_lane()
        server.kv_bytes_per_token = kv_bytes_per_token(accepted.layout)
