"""How much load one rule takes for the p99 that another rule has at a load of its own.

A time is judged by itself, or as a *stretch*: how many times as long it is as the request takes alone on an idle
server. For the p99 of all times a few of the longest prompts have the say, whatever happens to the others. Of the
stretch every request has the same say.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping

from first_tokens import NEVER

Request = tuple[int, float]  # its tokens; the milliseconds to its first token, or NEVER
LENGTHS = (1024, 4096, 16384, 65536)  # as prefill-cli bench groups them


def requests_of(report: dict) -> list[Request]:
    """Returns the requests of a report of `prefill-cli bench --json --each`."""
    times = [(each["tokens"], each["first_token_ms"]) for each in report["each"]]
    return [(tokens, NEVER if ms is None else ms) for tokens, ms in times]


def percentile(values: Iterable[float], share: float) -> float:
    """Returns the nearest rank."""
    ranked = sorted(values)
    return ranked[math.ceil(share * len(ranked)) - 1]


def alone_ms(profile: dict, policy: str) -> Callable[[int], float]:
    """Returns the time of a prompt alone, by its tokens. Between the lengths of the profile it grows by a power."""

    def times_of(name: str) -> list[tuple[float, float]]:
        rows = [prompt for prompt in profile["prompts"] if prompt["policy"] == name]
        return sorted(
            (math.log(row["num_tokens"]),
             math.log(row["layer_us"] * (profile["num_layers"] - 1) + row["last_layer_us"] + row["first_token_us"]
                      + profile["request_us"]))
            for row in rows)  # fmt: skip

    times = {name: times_of(name) for name in ("dense", "share")}

    def alone(tokens: int) -> float:
        shares = policy == "share" or policy == "auto" and tokens >= profile["crossover_tokens"]
        known = times["share" if shares else "dense"]
        above = min(max(1, bisect.bisect(known, (math.log(tokens),))), len(known) - 1)
        (x0, y0), (x1, y1) = known[above - 1 : above + 1]
        return math.exp(y0 + (math.log(tokens) - x0) * (y1 - y0) / (x1 - x0)) / 1e3

    return alone


def full_speedup(trace: str, alone: Callable[[int], float]) -> float:
    """Returns how many times as fast a trace must come so that its requests, one by one, take as long as they come."""
    rows = [line.split(",") for line in trace.splitlines() if line[:1].isdigit()]
    return 1e3 * max(float(row[0]) for row in rows) / sum(alone(int(row[1])) for row in rows)


def measures(requests: list[Request], alone: Callable[[int], float]) -> dict[str, float]:
    """Returns percentiles of the times and of the stretches of all, and the p99 of every group of lengths."""
    times = [ms for _, ms in requests]
    stretches = [ms / alone(tokens) for tokens, ms in requests]
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    groups: dict[str, list[float]] = {}
    for tokens, ms in requests:
        bound = next((bound for bound in LENGTHS if tokens <= bound), None)
        groups.setdefault(f"p99_ms up to {bound}" if bound else "p99_ms of more", []).append(ms)
    return {
        **{f"{name}_ms": percentile(times, share) for name, share in shares.items()},
        **{f"{name}_stretch": percentile(stretches, share) for name, share in shares.items()},
        **{name: percentile(groups[name], 0.99) for name in sorted(groups)},
    }


def load_for(mark: float, p99_of: Mapping[float, float]) -> tuple[float, str]:
    """Returns the load at which the p99 reaches the mark, by straight lines between the loads that were tried.

    The word says on which side of the returned load it is, if it is none of those: "below", "above", or "".
    """
    loads = sorted(p99_of)
    if p99_of[loads[0]] > mark:
        return loads[0], "below"
    for low, high in zip(loads, loads[1:]):
        if p99_of[high] <= mark:
            continue
        if p99_of[high] == NEVER:
            return low, ""
        return low + (high - low) * (mark - p99_of[low]) / (p99_of[high] - p99_of[low]), ""
    return loads[-1], "above"
