"""Times to the first token. A request that got none, because it was refused or failed, counts as later than all others.

Whoever left such requests out would find a server the faster, the more it refuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

NEVER = math.inf
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_REPORTED = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}


def shown(milliseconds: float) -> float | str:
    return "refused" if milliseconds == NEVER else round(milliseconds, 1)


def percentiles(times: list[float], refused: int = 0) -> dict:
    """Returns the nearest ranks. count: of the requests that got a first token."""
    ranked = sorted(times) + [NEVER] * refused
    if not ranked:
        return {"count": 0, "refused": 0}
    at = {name: shown(ranked[math.ceil(share * len(ranked)) - 1]) for name, share in _SHARES.items()}
    return {"count": len(times), "refused": refused, **at}


def first_token_times(log: str, refused: Mapping[int, int]) -> dict[str, dict]:
    """Returns the percentiles of ttft_ms of every prompt length in these lines of a log.

    refused: how many prompts of each length got no first token, as their senders counted; the log of a refusal does not
    name the length.
    """
    times: dict[int, list[float]] = {length: [] for length in refused}
    for tokens, ttft in re.findall(r" outcome=ok .*?\btokens=(\d+) .*? ttft_ms=([\d.]+)", log):
        times.setdefault(int(tokens), []).append(float(ttft))
    return {str(length): percentiles(values, refused.get(length, 0)) for length, values in sorted(times.items())}


def refused_of_report(group: dict) -> int:
    """Returns how many requests of a report of `prefill-cli bench --json`, or of a group in it, got no first token."""
    return group["requests"] - group["first_token_ms"]["count"]


def percentile_of_report(group: dict, share: float) -> float:
    """Returns the percentile over all requests of a report, at most: it has no more than some of those of the answered."""
    answered = group["first_token_ms"]["count"]
    rank = math.ceil(share * group["requests"])
    if rank > answered:
        return NEVER
    name = next(name for name, known in _REPORTED.items() if math.ceil(known * answered) >= rank)
    return group["first_token_ms"][name]


def mean_of_report(group: dict) -> float:
    return NEVER if refused_of_report(group) else group["first_token_ms"]["mean"]
