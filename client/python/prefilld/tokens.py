"""Generated tokens, and what a Generate call says beside them. Nothing here reads a network."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefilld.errors import data_loss


@dataclass(frozen=True)
class Token:
    """A generated token. top_logprobs: (token id, natural log-probability), most likely first."""

    id: int
    index: int
    logprob: float
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)


class Generation:
    """Keeps what one Generate call has brought so far.

    started: the GenerateStarted message, which comes first. result: the GenerateResult message after the last token.
    """

    def __init__(self):
        self.started = None
        self.result = None

    def take(self, event):
        """Returns the Token or the PrefillProgress message that a GenerateEvent brought, or None."""
        kind = event.WhichOneof("event")
        if kind == "token":
            token = event.token.token
            top = [(t.token_id, t.logprob) for t in token.top_logprobs]
            return Token(token.token_id, event.token.index, token.logprob, top)
        if kind == "progress":
            return event.progress
        if kind == "result":
            self.result = event.result
        if kind == "started":
            self.started = event.started
        return None

    def finish(self) -> None:
        if self.result is None:
            raise data_loss("the stream ended without a result")
