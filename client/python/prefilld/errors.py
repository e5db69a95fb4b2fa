"""The one family of exceptions: whatever goes wrong between this client and a server is a PrefilldError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import grpc.aio

from prefilld import wire

_Code = grpc.StatusCode

# Advice for the caller, by status. The statuses themselves stand at PrefillService in prefill.proto.
_ADVICE = {
    _Code.INVALID_ARGUMENT: "correct the request: the message names field, value and limit",
    _Code.FAILED_PRECONDITION: "ask a server that runs this model, or ask for a layout that it has",
    _Code.RESOURCE_EXHAUSTED: "ask again after retry_after seconds, or ask another server",
    _Code.UNAUTHENTICATED: "send what tells the server whose the request is: a certificate, or metadata",
    _Code.PERMISSION_DENIED: "have the server's operator allow it",
    _Code.UNIMPLEMENTED: "ask a server whose operator configured it",
    _Code.DEADLINE_EXCEEDED: "give more time, or ask a server with a shorter queue",
    _Code.ABORTED: "take the KV cache faster, then ask again",
    _Code.UNAVAILABLE: "ask again, or ask another server: this one is away or goes",
    _Code.ALREADY_EXISTS: "use another request_id",
    _Code.NOT_FOUND: "reach the server that accepted the request: its address may not stand for several servers",
    _Code.CANCELLED: "nothing: you cancelled the call",
    _Code.DATA_LOSS: "drop what arrived and ask again",
}
_RETRYABLE = {_Code.RESOURCE_EXHAUSTED, _Code.UNAVAILABLE, _Code.ABORTED, _Code.DATA_LOSS}


class PrefilldError(Exception):
    """A call failed; nothing that it brought may be used.

    code: the grpc.StatusCode. details: the reason in words. retry_after: seconds after which the
    server asks to come back, or None when it does not say.
    """

    def __init__(self, code: grpc.StatusCode, details: str, retry_after: float | None = None):
        super().__init__(code, details, retry_after)
        self.code = code
        self.details = details
        self.retry_after = retry_after

    @property
    def retryable(self) -> bool:
        """Tells whether the same request may succeed later, or at another server."""
        return self.code in _RETRYABLE

    @property
    def advice(self) -> str:
        """Says what the caller can do about it."""
        return _ADVICE.get(self.code, "look into the server's log")

    def __str__(self) -> str:
        pause = "" if self.retry_after is None else f"; come back in {self.retry_after:g} s"
        return f"{self.code.name}: {self.details}{pause}"


class TransferError(PrefilldError):
    """The transfer is not what was asked for or promised.

    code: DATA_LOSS (a frame is damaged, missing or out of place, or the stream ended without a
    result) or FAILED_PRECONDITION (the layout is not the one asked for).
    """


class Cancelled(PrefilldError):
    """The caller cancelled the call, or closed its client."""

    def __init__(self, details: str = "cancelled by the caller", *_):
        super().__init__(_Code.CANCELLED, details)

    def __reduce__(self):
        return Cancelled, (self.details,)


def data_loss(details: str) -> TransferError:
    return TransferError(_Code.DATA_LOSS, details)


def from_rpc(error: grpc.RpcError, cancelled: bool) -> PrefilldError:
    """Turns what gRPC raises into one of the family.

    cancelled: whether the caller cancelled the call. If not, CANCELLED comes from a server that shuts down.
    """
    code, details = error.code(), error.details() or ""
    if code is _Code.CANCELLED:
        return Cancelled() if cancelled else PrefilldError(_Code.UNAVAILABLE, "the server cancelled the call")
    return PrefilldError(code, details, _retry_after(error))


@contextlib.contextmanager
def one_family(cancelled=lambda: False) -> Iterator[None]:
    """Raises what gRPC raises inside as PrefilldError. cancelled() tells whether the caller ended the call."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error, cancelled()) from error


@contextlib.contextmanager
def closed_is_cancelled() -> Iterator[None]:
    """Raises what gRPC raises inside when the client has been closed as Cancelled. For calls that were made before."""
    try:
        yield
    except (ValueError, grpc.aio.UsageError):
        raise Cancelled("the client was closed") from None


def _retry_after(error: grpc.RpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in wire.RpcStatus.FromString(value).details:
                if detail.type_url.endswith("/google.rpc.RetryInfo"):
                    delay = wire.RetryInfo.FromString(detail.value).retry_delay
                    return delay.seconds + delay.nanos / 1e9
    return None
