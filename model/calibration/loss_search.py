"""Chooses by what is lost: which prompts choose and which judge, and the sparsest candidate that keeps a promise.

Nothing here serves a model; calibrate.py does. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

# The best of several candidates looks better on the prompts that chose it than it is.
MARGIN = 0.2  # of the rise allowed, kept free while choosing


@dataclass(frozen=True)
class Prompt:
    name: str
    domain: str  # kind of text
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Loss:
    """Nats a token that prompts lose against dense attention, prompt by prompt."""

    lost: tuple[float, ...]
    tokens: tuple[int, ...]  # of each prompt
    density: float

    @property
    def rises(self) -> dict[int, float]:
        """Returns by which part perplexity rises, for prompts about as long as each power of two."""
        by_length: dict[int, list[float]] = {}
        for lost, tokens in sorted(zip(self.lost, self.tokens), key=lambda prompt: prompt[1]):
            by_length.setdefault(1 << round(math.log2(tokens)), []).append(lost)
        return {length: math.expm1(fmean(values)) for length, values in by_length.items()}

    @property
    def rise(self) -> float:
        """Returns the rise at the length where it is greatest: a promise holds at each."""
        return max(self.rises.values())

    @property
    def error(self) -> float:
        """Returns the standard error of the mean over all prompts."""
        return stdev(self.lost) / math.sqrt(len(self.lost))

    @property
    def worst(self) -> float:
        return math.expm1(max(self.lost))

    def described(self) -> dict:
        return {
            "prompts": len(self.lost),
            "perplexity_rise": round(self.rise, 5),
            "standard_error": round(self.error, 5),
            "worst_prompt": round(self.worst, 5),
            "perplexity_rise_by_tokens": {str(length): round(rise, 5) for length, rise in self.rises.items()},
            "density": round(self.density, 4),
        }


def split(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Deals the prompts of every domain out in turn, the shorter ones first: (those that choose, those that judge).

    Raises ValueError when a domain has a single prompt, or a part fewer than two, for which there is no error.
    """
    domains: dict[str, list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda prompt: (len(prompt.tokens), prompt.name)):
        domains.setdefault(prompt.domain, []).append(prompt)
    for domain, members in domains.items():
        if len(members) < 2:
            raise ValueError(f"domain {domain!r} has one prompt; at least two are needed, one to choose, one to judge")
    choosing = [prompt for members in domains.values() for prompt in members[0::2]]
    judging = [prompt for members in domains.values() for prompt in members[1::2]]
    if len(judging) < 2:
        raise ValueError(f"{len(prompts)} prompts; at least four are needed, two to choose and two to judge")
    return choosing, judging


def sparsest(count: int, chosen_on: Callable[[int], Loss], rise: float) -> int | None:
    """Returns the last of `count` candidates that keeps the rise on the prompts that choose, or None.

    The candidates stand in the order of what they compute, the densest first, so that the loss grows along them; they
    are searched by halving. A candidate keeps the rise when its loss and one standard error more lie within it.
    """
    allowed = math.log1p(rise) * (1 - MARGIN)
    low, high = -1, count  # low keeps it or is none, high does not or is none
    while high - low > 1:
        middle = (low + high) // 2
        loss = chosen_on(middle)
        if math.log1p(loss.rise) + loss.error <= allowed:
            low = middle
        else:
            high = middle
    return low if low >= 0 else None


def confirmed(first: int, judged_on: Callable[[int], Loss], rise: float) -> tuple[int | None, int]:
    """Returns the first candidate, from `first` to denser ones, whose loss on the prompts that judge is within the rise
    at every length, and how many were judged. Each one judged after the first makes the promise a little weaker.
    """
    for judged, candidate in enumerate(range(first, -1, -1), 1):
        if judged_on(candidate).rise <= rise:
            return candidate, judged
    return None, first + 1
