"""The fields that are known of a prefill once a server has accepted it."""

from __future__ import annotations

from typing import Any

from prefilld.transfer import Reception


class AcceptedFields:
    """The fields of a prefill that are known once the server has accepted it; RuntimeError before."""

    _reception: Reception

    @property
    def _accepted(self):
        if self._reception.accepted is None:
            raise RuntimeError("the server has not accepted the request yet: wait_accepted() waits for it")
        return self._reception.accepted

    @property
    def request_id(self) -> str:
        return self._accepted.request_id

    @property
    def layout(self) -> Any:
        """The KvLayout message."""
        return self._accepted.layout

    @property
    def queue_position(self) -> int:
        """Requests that came before this one and were not done when it was accepted."""
        return self._accepted.queue_position

    @property
    def receiver_key(self) -> str:
        """The secret that other receivers have to show; empty if there are none, and for such a receiver."""
        return self._accepted.receiver_key

    @property
    def priority(self) -> int:
        """The class that the request has, which may be lower than what it asked for."""
        return self._accepted.priority

    @property
    def result(self) -> Any:
        """The PrefillResult message, once the iteration has ended; None before."""
        return self._reception.result if self._whole else None

    _whole = False
