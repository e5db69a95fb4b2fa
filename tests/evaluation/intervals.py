"""95 % intervals. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float

    def rounded(self, digits: int = 4) -> dict[str, float]:
        return {name: round(number, digits) for name, number in vars(self).items()}

    def clipped(self, low: float, high: float) -> Estimate:
        """Returns the estimate with its interval cut to what is possible."""
        return Estimate(self.value, max(low, self.low), min(high, self.high))


def proportion(right: int, count: int) -> Estimate:
    """Returns the Wilson score interval."""
    if count < 1:
        raise ValueError("a proportion of nothing")
    share, spread = right / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def paired_difference(pairs: Sequence[tuple[bool, bool]]) -> Estimate:
    """Returns the first share of right answers minus the second, on the same prompts (Bonett and Price 2012).

    Adding one to each discordant count keeps the interval honest where the two always agree.
    """
    count = len(pairs)
    if count < 1:
        raise ValueError("a difference of nothing")
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    p, q = (only_first + 1) / (count + 2), (only_second + 1) / (count + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    value = (only_first - only_second) / count
    return Estimate(value, min(value, max(-1.0, p - q - half)), max(value, min(1.0, p - q + half)))


def student_t(freedom: int) -> float:
    """Returns the 97.5 % point of Student's t, to 0.2 %, by Abramowitz and Stegun 26.7.5, which needs three degrees of
    freedom.
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def mean(values: Sequence[float]) -> Estimate:
    """Returns Student's interval. A single value has no spread, and its interval is all numbers."""
    centre, count = fmean(values), len(values)
    half = student_t(count - 1) * stdev(values) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(centre, centre - half, centre + half)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the mean of independent estimates, one per task, with equal weights."""
    count = len(estimates)
    value = fmean(e.value for e in estimates)
    below = math.sqrt(sum((e.value - e.low) ** 2 for e in estimates)) / count
    above = math.sqrt(sum((e.high - e.value) ** 2 for e in estimates)) / count
    return Estimate(value, value - below, value + above)
