"""Tokens of an answer to its text: whole characters alone, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from prefilld.text_tokens import TextStream


class StopStrings:
    """Cuts a text that comes in pieces at the first stop string. found: whether one came."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self.found = False

    def add(self, piece: str) -> str:
        """Returns what may be shown by now; nothing once a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        held = self._beginning_at_end(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        """Returns how many characters at the end of the text begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class AnswerText:
    """The text of one answer, token by token. has_stopped: a stop string came, and no more text does."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        silent_ids: Collection[int],
        stops: Sequence[str],
        prompt: Sequence[int] = (),
    ):
        """silent_ids: tokens that end an answer and have no text. prompt: its last tokens."""
        self._stream = TextStream(decode, prompt)
        self._silent_ids = silent_ids
        self._stops = StopStrings(stops)

    @property
    def has_stopped(self) -> bool:
        return self._stops.found

    def add(self, token_id: int) -> str:
        return "" if token_id in self._silent_ids else self._stops.add(self._stream.add(token_id))

    def rest(self) -> str:
        """Returns what was held back, once the last token has come."""
        return self._stops.add(self._stream.rest()) + self._stops.rest()
