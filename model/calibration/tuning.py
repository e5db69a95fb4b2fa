"""Chooses the groups that share and the thresholds, measured on recorded prompts, for a given recall."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benefit import Prices, benefit, parts_that_save, price_of_recall, shared_heads_hold
from dumps import BUDGETS, GAMMAS, Dump
from simulation import SHARED, Group, Summary, Thresholds, serve, summarize

# If several are equally good, the first is taken.
PATTERN_GAMMAS = (0.9, 0.95, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
TAUS = (0.4, 0.3, 0.5, 0.2, 0.6, 0.1)
DELTAS = (1.0, 0.5, 0.3)
SLASH_GAMMAS = [float(g) for g in GAMMAS if 0.4 <= g < 1]


@dataclass(frozen=True)
class Goal:
    """The recall that sparse heads must keep, over heads and prompts, and the figures that decide on sharing."""

    recall: float
    low_recall: float  # 5th percentile
    coverage: float
    pivot_cost: float = 1.0  # density that an exact head counts for

    def reached_by(self, found: Summary) -> bool:
        return found.recall >= self.recall and found.low_recall >= self.low_recall


@dataclass(frozen=True)
class Choice:
    thresholds: Thresholds
    shared: list[Group]
    summary: Summary  # on the prompts that it was chosen on
    reached: bool  # the goal
    cost: float  # density, exact heads counted as the goal says

    def better_than(self, other: Choice) -> bool:
        if self.reached != other.reached:
            return self.reached
        if self.reached:
            return self.cost < other.cost
        return self.summary.recall > other.summary.recall


def judge(dumps: list[Dump], shared: list[Group], thresholds: Thresholds) -> Summary:
    return summarize([serve(dump, shared, thresholds) for dump in dumps])


def members_hold(dumps: list[Dump], shared: list[Group], thresholds: Thresholds) -> bool:
    prompts = [serve(dump, shared, thresholds) for dump in dumps]
    recall, role = (np.array([getattr(p, name) for p in prompts]) for name in ("recall", "role"))
    return shared_heads_hold(dumps, recall, role == SHARED, thresholds.gamma)


def tune_vertical_slash(dumps: list[Dump], shared: list[Group], thresholds: Thresholds, goal: Goal) -> Choice:
    """Returns gamma and floor of vertical-slash with the lowest density that reaches the goal; if none does, those with
    the highest recall.
    """
    best: Choice | None = None
    for gamma, budget in itertools.product(SLASH_GAMMAS, BUDGETS):
        tried = replace(thresholds, vertical_slash_gamma=gamma, min_budget_tokens=budget)
        found = judge(dumps, shared, tried)
        cost = found.density - (1 - goal.pivot_cost) * found.pivots / len(dumps[0].mass)
        choice = Choice(tried, shared, found, goal.reached_by(found), cost)
        if best is None or choice.better_than(best):
            best = choice
    return best


def vertical_slash_alone(dumps: list[Dump], goal: Goal) -> Choice:
    return tune_vertical_slash(dumps, [], Thresholds(gamma=goal.recall, coverage=goal.coverage), goal)


def prices_at(dumps: list[Dump], choice: Choice, goal: Goal) -> Prices:
    return Prices(price_of_recall(dumps, choice.thresholds), goal.pivot_cost)


def most_saving(
    dumps: list[Dump], groups: list[Group], thresholds: Thresholds, prices: Prices, whole: bool
) -> tuple[Thresholds, list[Group]]:
    """Returns tau and delta at which sharing saves most, and the heads that share then."""
    best, most = (thresholds, []), 0.0
    for tau, delta in itertools.product(TAUS, DELTAS):
        tried = replace(thresholds, tau=tau, delta=delta)
        parts = groups
        if not whole:
            parts = [part for group in groups for part in parts_that_save(dumps, group, tried, prices)]
        benefits = {part: benefit(dumps, part, tried, prices) for part in parts}
        shared = [part for part in parts if benefits[part].wins(thresholds.coverage)]
        saved = sum(benefits[part].saved for part in shared)
        if saved > most and members_hold(dumps, shared, tried):
            best, most = (tried, shared), saved
    return best


def paying(dumps: list[Dump], shared: list[Group], thresholds: Thresholds, goal: Goal) -> Choice | None:
    """Tunes vertical-slash for the heads that do not share. At its new thresholds some groups may no longer gain by
    sharing; they are left out, and it is tuned again. Returns None when no group is left.
    """
    while shared:
        choice = tune_vertical_slash(dumps, shared, thresholds, goal)
        prices = prices_at(dumps, choice, goal)
        gain = [g for g in shared if benefit(dumps, g, choice.thresholds, prices).wins(goal.coverage)]
        if len(gain) == len(shared):
            return choice
        shared = gain
    return None


def tune(
    dumps: list[Dump],
    groups: list[Group],
    goal: Goal,
    whole: bool,
    progress: Callable[[float], None] = lambda done: None,
) -> Choice:
    """Tunes vertical-slash first, since most heads use it. Then, for every gamma of patterns, chooses what shares by
    what it saves, and tunes vertical-slash again for the heads that are left. Returns the cheapest result. With `whole`
    a group shares as it is or not at all; otherwise the parts of it that save something share.
    """
    best = alone = vertical_slash_alone(dumps, goal)
    prices = prices_at(dumps, alone, goal)
    for done, gamma in enumerate(PATTERN_GAMMAS):
        tried, shared = most_saving(dumps, groups, replace(alone.thresholds, gamma=gamma), prices, whole)
        choice = paying(dumps, shared, tried, goal)
        if choice and choice.better_than(best):
            best = choice
        progress((done + 1) / len(PATTERN_GAMMAS))
    return best


def oracle_density(dumps: list[Dump], gamma: float) -> float:
    """Returns the mean density when every row of every head keeps gamma with the fewest blocks. Keeping gamma only in
    the mean can cost less.
    """
    return float(np.mean([d.pivot_pattern(head, gamma).mean() for d in dumps for head in range(len(d.mass))]))
