"""The token by which a client tells a server whose requests it makes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence

import grpc

_KEY = "authorization"
_MAX_BYTES = 8192
_REST_SECONDS = 1.0
_LOOK_SECONDS = 1.0


class BearerToken:
    """A token in a file, because a command line shows in the list of processes. Thread-safe."""

    def __init__(self, path: str | os.PathLike):
        """Raises ValueError if the file holds no token, OSError if it cannot be read."""
        self._path = path
        self._lock = threading.Lock()  # of the one call that looks at the file
        self._next_look = 0.0
        self._version = self._version_now()
        self._token = self._read()

    def added_to(self, metadata: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call with the token. A call that brings one of its own keeps that alone."""
        if any(key == _KEY for key, _ in metadata):
            return tuple(metadata)
        return (*metadata, (_KEY, f"Bearer {self.token()}"))

    def token(self) -> str:
        """Returns the token.

        Once a second a call looks at the file, which is read again when it has changed and has rested for a second, so
        that nobody reads half of what is being written. A file that holds no token, or is gone, changes nothing. If it
        hangs, it holds up the call that looks, and no other.
        """
        if time.monotonic() >= self._next_look and self._lock.acquire(blocking=False):
            try:
                self._next_look = time.monotonic() + _LOOK_SECONDS
                self._look()
            finally:
                self._lock.release()
        return self._token

    def _look(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            version = self._version_now()
            age = time.time() - os.stat(self._path).st_mtime  # below 0: another clock wrote it
            if version != self._version and not 0 <= age < _REST_SECONDS:
                self._token = self._read()
                self._version = version

    def _version_now(self):
        facts = os.stat(self._path)
        return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns

    def _read(self) -> str:
        with open(self._path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        token = content.strip()
        if not token or len(content) > _MAX_BYTES or not all(33 <= byte <= 126 for byte in token):
            raise ValueError(
                f"token_file {os.fspath(self._path)} holds no token: one line of at most {_MAX_BYTES} printable ASCII "
                "characters without blanks"
            )
        return token.decode("ascii")


# These of gRPC's credentials encrypt. Others may not: those for tests and for one machine send plain text.
_ENCRYPTING = {"SSLChannelCredentials", "ALTSChannelCredentials", "ComputeEngineChannelCredentials"}


def _encrypts(credentials: grpc.ChannelCredentials | None) -> bool:
    inner = getattr(credentials, "_credentials", None)
    while type(inner).__name__ == "CompositeChannelCredentials":  # with credentials of calls beside
        inner = getattr(inner, "_channel_credentials", None)
    return type(inner).__name__ in _ENCRYPTING


def check_is_safe(
    addresses: Sequence[str], credentials: grpc.ChannelCredentials | None, token_without_tls: bool
) -> None:
    """Raises ValueError where a token would be everybody's on the way, which nothing takes back."""
    has_tls = _encrypts(credentials)
    for address in addresses:
        if not (has_tls or token_without_tls or address.startswith("unix:")):
            raise ValueError(
                f"token_file with {address} in plain text; a token goes over TLS or a Unix socket, unless "
                "token_without_tls is set"
            )
