"""Simulates what the server would do with a recorded prompt: the decisions of model/sparse/sharing_decision.h on the
dumps.

The maps are those of dense attention; under a sparse policy later layers see slightly other inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dumps import BUDGETS, GAMMAS, Dump, js_distance

VERTICAL_SLASH, PIVOT, SHARED = range(3)  # roles
DEARER = 1.25  # factor by which vertical-slash may cost more blocks, since it follows each head by itself
LARGE_MODEL_HEADS = 1024

Group = tuple[int, ...]  # heads, ascending


@dataclass(frozen=True)
class Thresholds:
    gamma: float = 0.9
    vertical_slash_gamma: float | None = None  # none: gamma
    tau: float = 0.4
    delta: float = 1.0  # 1: off
    coverage: float = 0.85
    min_budget_tokens: int = 128

    @property
    def at(self) -> tuple[int, int]:
        """Returns where a dump has the vertical-slash sets of the nearest thresholds that were kept."""
        nearest = lambda values, value: int(np.abs(np.array(values) - value).argmin())  # noqa: E731
        return nearest(BUDGETS, self.min_budget_tokens), nearest(GAMMAS, self.vertical_slash_gamma or self.gamma)


@dataclass
class Served:
    """The heads of a prompt: role, recall and density of each, [heads]."""

    role: np.ndarray
    recall: np.ndarray
    density: np.ndarray


@dataclass(frozen=True)
class OverPivot:
    """The heads of a group over the pattern of one of them. Arrays are [heads of the group]."""

    pattern_density: float
    recall: np.ndarray
    density: np.ndarray


@lru_cache(maxsize=1 << 16)
def over_pivot(dump: Dump, group: Group, pivot: int, gamma: float) -> OverPivot:
    patterns, heads = dump.patterns(gamma), list(group)
    added = patterns.by_estimate[heads] & ~patterns.last_row[pivot]
    return OverPivot(
        pattern_density=float(patterns.density[pivot]),
        recall=patterns.held[pivot, heads] + (dump.last_row_mass[heads] * added).sum(1) / dump.n,
        density=patterns.density[pivot] + added.sum(1) / len(dump.causal.row),
    )


@lru_cache(maxsize=1 << 16)
def distances(dump: Dump, group: Group, pivot: int) -> np.ndarray:
    return js_distance(dump.estimate[list(group)], dump.estimate[pivot])


def serve_group(dump: Dump, group: Group, thresholds: Thresholds) -> Served:
    """Simulates the heads of a group that may share, in its order."""
    heads, (budget, gamma) = np.array(group), thresholds.at
    served = Served(
        role=np.full(len(group), VERTICAL_SLASH),
        recall=dump.slash_recall[heads, budget, gamma],
        density=dump.slash_density[heads, budget, gamma],
    )
    near_uniform = np.ones(len(group), bool)
    if thresholds.delta < 1:
        near_uniform = dump.from_uniform[heads] <= thresholds.delta
    if not near_uniform.any() or thresholds.coverage <= 0:
        return served
    first = int(near_uniform.argmax())
    pivot = group[first]
    shared = over_pivot(dump, group, pivot, thresholds.gamma)
    worth = thresholds.coverage >= 1 or (
        dump.slash_recall[pivot, budget, gamma] < thresholds.coverage
        or dump.slash_density[pivot, budget, gamma] > DEARER * shared.pattern_density
    )
    if worth:
        joins = near_uniform & (distances(dump, group, pivot) < thresholds.tau)
        served.role[joins] = SHARED
        served.recall[joins], served.density[joins] = shared.recall[joins], shared.density[joins]
    served.role[first], served.recall[first], served.density[first] = PIVOT, 1, 1
    return served


def serve(dump: Dump, groups: Iterable[Group], thresholds: Thresholds) -> Served:
    """Simulates a whole prompt. `groups` are those that share."""
    budget, gamma = thresholds.at
    served = Served(
        role=np.full(len(dump.mass), VERTICAL_SLASH),
        recall=dump.slash_recall[:, budget, gamma].copy(),
        density=dump.slash_density[:, budget, gamma].copy(),
    )
    for group in groups:
        part, heads = serve_group(dump, group, thresholds), list(group)
        served.role[heads], served.recall[heads], served.density[heads] = part.role, part.recall, part.density
    return served


@dataclass(frozen=True)
class Summary:
    """Several prompts together. Recall is that of heads that are not exact; low_ is the 5th percentile over heads and
    prompts.
    """

    density: float
    density_among_1024: float  # the same pivots in a model of 1024 heads
    recall: float
    low_recall: float
    shared_recall: float | None  # none: no head shares
    low_shared_recall: float | None
    pivots: float  # heads a prompt, as the next two
    shared: float
    vertical_slash: float


def summarize(prompts: list[Served]) -> Summary:
    role, recall, density = (
        np.concatenate([getattr(p, name) for p in prompts]) for name in ("role", "recall", "density")
    )
    sparse, shared = role != PIVOT, role == SHARED
    of_prompt = lambda chosen: float(chosen.sum()) / len(prompts)  # noqa: E731
    pivots = of_prompt(~sparse)
    among = max(LARGE_MODEL_HEADS, len(prompts[0].role))
    return Summary(
        density=float(density.mean()),
        density_among_1024=float((pivots + (among - pivots) * density[sparse].mean()) / among),
        recall=float(recall[sparse].mean()),
        low_recall=float(np.percentile(recall[sparse], 5)),
        shared_recall=float(recall[shared].mean()) if shared.any() else None,
        low_shared_recall=float(np.percentile(recall[shared], 5)) if shared.any() else None,
        pivots=pivots,
        shared=of_prompt(shared),
        vertical_slash=of_prompt(role == VERTICAL_SLASH),
    )
