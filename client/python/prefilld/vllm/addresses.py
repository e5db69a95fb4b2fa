"""Addresses of servers, and the patterns by which an operator says which of them requests may name.

The patterns are those of prefilld's own --deliver_to_allow, without paths of Unix sockets: a request names a host and a
port. Nothing here needs vLLM.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_NAME_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_NAME_LABEL}(\.{_NAME_LABEL})*")
_MAX_NAME = 253


@dataclass(frozen=True)
class Address:
    """host: a name in lower case, or a number without brackets; port 0 stands for none, as of a Unix socket's path."""

    host: str | ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads host:port, [IPv6]:port or unix:/path. Raises ValueError."""
        if text.startswith("unix:/"):
            if not text.isprintable() or len(text) > 100 or "*" in text:
                raise ValueError(f"{text!r} is no path of a Unix socket")
            return cls(text, 0)
        host, _, port = text.rpartition(":")
        number = read_port(port)
        if number is None:
            raise ValueError(f"{text!r} is not host:port with a port from 1 to 65535")
        if host.startswith("[") and host.endswith("]"):
            if "%" in host:
                raise ValueError(f"{text!r} names an interface of one machine")
            return cls(ipaddress.IPv6Address(host[1:-1]), number)
        return cls(_host(host), number)

    def __str__(self) -> str:
        if isinstance(self.host, ipaddress.IPv6Address):
            return f"[{self.host}]:{self.port}"
        return f"{self.host}:{self.port}" if self.port else str(self.host)


def read_port(text: str) -> int | None:
    """Returns a port from 1 to 65535, or None."""
    if re.fullmatch(r"[0-9]{1,5}", text) and 0 < int(text) < 65536:
        return int(text)
    return None


def _host(text: str) -> str | ipaddress.IPv4Address:
    """Reads a name or an IPv4 address. What has numbers and dots alone is an address, and never a name."""
    if re.fullmatch(r"[0-9.]+", text):
        return ipaddress.IPv4Address(text)
    name = text.lower().removesuffix(".")
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise ValueError(f"{text!r} is neither a name of a host nor an IPv4 address")
    return name


class AddressPattern:
    """Admits addresses of its own kind alone. `*` as a port is any port.

    10.2.*.*:50051     IPv4: four labels, numbers or `*`.
    [fd00:1::*]:50051  IPv6, however it is written. `*` is any group of 16 bits.
    *.pods:50051       Names, in any case. `*` is any run of characters within a label; the last of several labels may
                       not have one.
    """

    def __init__(self, text: str):
        """Raises ValueError for what is none of these."""
        self._text = text
        host, _, port = text.rpartition(":")
        self._port = None if port == "*" else read_port(port)
        if self._port is None and port != "*":
            raise ValueError(f"{text!r} has no port from 1 to 65535, and no *")
        if host.startswith("[") and host.endswith("]"):
            self._kind, self._labels = "IPv6", _groups(host[1:-1])
        elif re.fullmatch(r"[0-9.*]+", host):
            self._kind, self._labels = "IPv4", host.split(".")
            ipaddress.IPv4Address(".".join("1" if label == "*" else label for label in self._labels))
        else:
            self._kind, self._labels = "name", host.lower().removesuffix(".").split(".")
            if len(self._labels) > 1 and "*" in self._labels[-1]:
                raise ValueError(f"{text!r} has a * in its last label, which would admit anybody's domain")
            _host(host.replace("*", "a"))

    def __str__(self) -> str:
        return self._text

    def admits(self, address: Address) -> bool:
        if self._port is not None and self._port != address.port:
            return False
        host = address.host
        if isinstance(host, ipaddress.IPv6Address):
            return self._kind == "IPv6" and _all_match(self._labels, _groups(host.exploded))
        if isinstance(host, ipaddress.IPv4Address):
            return self._kind == "IPv4" and _all_match(self._labels, str(host).split("."))
        return self._kind == "name" and _all_match(self._labels, host.split("."))


def _groups(host: str) -> list[str]:
    """Returns the eight groups of an IPv6 address, of which any may be `*`, without leading zeros."""
    head, gap, tail = host.lower().partition("::")
    first, last = (half.split(":") if half else [] for half in (head, tail))
    zeros = 8 - len(first) - len(last)
    groups = [*first, *["0"] * zeros, *last]
    if len(groups) != 8 or bool(gap) != (zeros > 0) or not all(re.fullmatch(r"\*|[0-9a-f]{1,4}", g) for g in groups):
        raise ValueError(f"[{host}] is no IPv6 address, nor one with * for some of its groups")
    return [group.lstrip("0") or "0" for group in groups]


def _all_match(globs: list[str], labels: list[str]) -> bool:
    return len(globs) == len(labels) and all(map(_matches, globs, labels))


def _matches(glob: str, label: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, glob.split("*"))), label, re.DOTALL) is not None
