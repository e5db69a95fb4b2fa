"""Which groups are to share, and at which thresholds: measured on recorded prompts, for a recall that is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dumps import BUDGETS, GAMMAS, Dump
from simulation import PIVOT, SHARED, Group, Summary, Thresholds, over_pivot, serve, serve_group, summarize

TAUS = (0.4, 0.3, 0.5, 0.2, 0.6, 0.1)  # of equals the first is taken
DELTAS = (1.0, 0.5, 0.3)
LOWEST_GAMMA = 0.5
# Slack of the 5th percentile below the recall asked for; and of shared heads below gamma, mean and percentile.
LOW_SLACK, SHARED_SLACK, LOW_SHARED_SLACK = 0.10, 0.03, 0.10


@dataclass(frozen=True)
class Benefit:
    """A group of heads if it shares, mean over its heads and prompts. Exact heads have recall 1 and density 1."""

    heads: int
    shared: float  # share of the members that found the pivot near enough
    recall: float
    density: float
    exact: float  # share of exact heads: pivots
    member_recall: float  # of the members that shared
    member_density: float
    vertical_slash_recall: float  # of the same heads, at the same thresholds
    vertical_slash_density: float
    vertical_slash_density_at_recall: float  # what `recall` costs with vertical-slash, with the least floor
    vertical_slash_recall_at_member_density: float  # what `member_density` buys, head by head
    vertical_slash_recall_at_member_density_worst: float

    def wins(self, coverage: float, pivot_cost: float) -> bool:
        """Sharing costs fewer blocks than vertical-slash for the same recall, the pivot's pass included, and at the
        members' cost vertical-slash fails one of them."""
        return (
            self.shared > 0
            and self.density - (1 - pivot_cost) * self.exact < self.vertical_slash_density_at_recall
            and self.vertical_slash_recall_at_member_density_worst < coverage
        )


def benefit(dumps: list[Dump], group: Group, thresholds: Thresholds) -> Benefit:
    heads, (budget, gamma) = list(group), thresholds.at
    prompts = [serve_group(dump, group, thresholds) for dump in dumps]
    recall, density, role = (np.array([getattr(p, name) for p in prompts]) for name in ("recall", "density", "role"))
    shared = role == SHARED
    of_shared = lambda values: float(values[shared].mean()) if shared.any() else float("nan")  # noqa: E731
    # [budgets, gammas]; the least floor buys most recall per block.
    curves_recall = np.mean([d.slash_recall[heads].mean(0) for d in dumps], axis=0)
    curves_density = np.mean([d.slash_density[heads].mean(0) for d in dumps], axis=0)
    rival = np.array(
        [
            [np.interp(cost, d.slash_density[h, 0], d.slash_recall[h, 0]) for h, cost in zip(heads, p.density)]
            for d, p in zip(dumps, prompts)
        ]
    )
    of_head = [rival[shared[:, i], i].mean() for i in range(len(heads)) if shared[:, i].any()]
    return Benefit(
        heads=len(heads),
        shared=float(shared.sum()) / max(1, shared.size - len(dumps)),
        recall=float(recall.mean()),
        density=float(density.mean()),
        exact=float((role == PIVOT).mean()),
        member_recall=of_shared(recall),
        member_density=of_shared(density),
        vertical_slash_recall=float(curves_recall[budget, gamma]),
        vertical_slash_density=float(curves_density[budget, gamma]),
        vertical_slash_density_at_recall=float(np.interp(recall.mean(), curves_recall[0], curves_density[0])),
        vertical_slash_recall_at_member_density=of_shared(rival),
        vertical_slash_recall_at_member_density_worst=float(min(of_head, default=1.0)),
    )


@dataclass(frozen=True)
class Choice:
    thresholds: Thresholds
    shared: list[Group]
    summary: Summary  # on the prompts that it was chosen on
    reached: bool  # the recall asked for
    cost: float  # density, exact heads counted as pivot_cost

    def better_than(self, other: Choice) -> bool:
        if self.reached != other.reached:
            return self.reached
        return self.cost < other.cost if self.reached else self.summary.recall > other.summary.recall


def judge(dumps: list[Dump], shared: list[Group], thresholds: Thresholds) -> Summary:
    return summarize([serve(dump, shared, thresholds) for dump in dumps])


def shared_heads_hold(mean: float, low: float, gamma: float) -> bool:
    """What heads must keep over another's pattern: mean, and 5th percentile."""
    return mean >= gamma - SHARED_SLACK and low >= gamma - LOW_SHARED_SLACK


def patterns_hold(dumps: list[Dump], groups: list[Group], gamma: float) -> bool:
    """Whether all heads of each group could share the pattern of its first one."""
    if not groups:
        return True
    recall = np.concatenate([over_pivot(d, group, group[0], gamma).recall[1:] for d in dumps for group in groups])
    return shared_heads_hold(float(recall.mean()), float(np.percentile(recall, 5)), gamma)


def reaches(found: Summary, recall: float, gamma: float) -> bool:
    """All sparse heads against the recall asked for, the shared ones against gamma as well."""
    if found.recall < recall or found.low_recall < recall - LOW_SLACK:
        return False
    return found.shared_recall is None or shared_heads_hold(found.shared_recall, found.low_shared_recall, gamma)


def tune(
    dumps: list[Dump],
    groups: list[Group],
    recall: float,
    coverage: float,
    pivot_cost: float = 1.0,
    taus: tuple[float, ...] = TAUS,
    deltas: tuple[float, ...] = DELTAS,
    budgets: tuple[int, ...] = BUDGETS,
    progress: Callable[[float], None] = lambda done: None,
) -> Choice:
    """The thresholds, and the groups that win at them, of the lowest cost that reaches `recall`; where none does, those
    with the highest recall."""
    gammas = [float(g) for g in GAMMAS if LOWEST_GAMMA <= g < 1]
    best: Choice | None = None
    for done, gamma in enumerate(gammas):
        for tau, delta, budget in itertools.product(taus, deltas, budgets):
            thresholds = Thresholds(gamma, tau, delta, coverage, budget)
            shared = [g for g in groups if benefit(dumps, g, thresholds).wins(coverage, pivot_cost)]
            found = judge(dumps, shared, thresholds)
            cost = found.density - (1 - pivot_cost) * found.pivots / len(dumps[0].mass)
            choice = Choice(thresholds, shared, found, reaches(found, recall, gamma), cost)
            if best is None or choice.better_than(best):
                best = choice
        progress((done + 1) / len(gammas))
    return best


def vertical_slash_alone(dumps: list[Dump], recall: float) -> Choice:
    """The cheapest thresholds at which vertical-slash reaches `recall` without any sharing."""
    return tune(dumps, [], recall, coverage=0.0, taus=(0.0,), deltas=(1.0,))


def oracle_density(dumps: list[Dump], gamma: float) -> float:
    """Mean density of every head's own smallest pattern that holds gamma: what no choice of blocks can beat."""
    return float(np.mean([d.pivot_pattern(head, gamma).mean() for d in dumps for head in range(len(d.mass))]))
