"""Measures, on recorded prompts, what a group of heads saves by sharing, and which part of it saves most.

Heads that keep more and heads that cost less are made comparable by a price: what vertical-slash pays for recall.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dumps import GAMMAS, Dump
from simulation import PIVOT, SHARED, Group, Thresholds, over_pivot, serve_group

# Over another head's pattern, heads may keep less than gamma by this much: in the mean, and at the 5th percentile. The
# served limits are 0.03 and 0.10; the rest is left for prompts other than those of the choice.
SHARED_SLACK, LOW_SHARED_SLACK = 0.0, 0.07


@dataclass(frozen=True)
class Prices:
    """Prices in the density of one head."""

    recall: float  # of all of it
    pivot: float = 1.0  # of an exact head


def price_of_recall(dumps: list[Dump], thresholds: Thresholds) -> float:
    """Returns the density per recall that vertical-slash pays for a little more recall at these thresholds."""
    budget, gamma = thresholds.at
    around = [max(0, gamma - 2), min(len(GAMMAS) - 1, gamma + 2)]
    density, recall = (
        np.mean([getattr(d, name)[:, budget][:, around].mean(0) for d in dumps], axis=0)
        for name in ("slash_density", "slash_recall")
    )
    return float((density[1] - density[0]) / (recall[1] - recall[0]))


def shared_heads_hold(dumps: list[Dump], recall: np.ndarray, shared: np.ndarray, gamma: float) -> bool:
    """Tells whether shared heads keep what they must at every length, rounded to a power of two, because on longer
    prompts another head's pattern fits less well. Arrays are [prompts, heads].
    """
    length = np.array([d.num_tokens.bit_length() for d in dumps])
    kept = (recall[length == one][shared[length == one]] for one in set(length))
    return all(
        of_length.mean() >= gamma - SHARED_SLACK and np.percentile(of_length, 5) >= gamma - LOW_SHARED_SLACK
        for of_length in kept
        if len(of_length)
    )


def patterns_hold(dumps: list[Dump], groups: list[Group], gamma: float) -> bool:
    """Tells whether all heads of each group could share the pattern of its first one."""
    if not groups:
        return True
    recall = np.array(
        [np.concatenate([over_pivot(d, group, group[0], gamma).recall[1:] for group in groups]) for d in dumps]
    )
    return shared_heads_hold(dumps, recall, np.ones(recall.shape, bool), gamma)


@dataclass(frozen=True)
class GroupServed:
    """A group that shares, on several prompts. Arrays are [prompts, heads]."""

    role: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    slash_recall: np.ndarray  # of the same heads by vertical-slash
    slash_density: np.ndarray

    @staticmethod
    def of(dumps: list[Dump], group: Group, thresholds: Thresholds) -> GroupServed:
        prompts, heads, at = [serve_group(dump, group, thresholds) for dump in dumps], list(group), thresholds.at
        return GroupServed(
            *(np.array([getattr(p, name) for p in prompts]) for name in ("role", "recall", "density")),
            *(np.array([getattr(d, name)[heads, *at] for d in dumps]) for name in ("slash_recall", "slash_density")),
        )

    @property
    def shared(self) -> np.ndarray:
        return self.role == SHARED

    def saved(self, prices: Prices) -> np.ndarray:
        """Returns what each head saves by sharing against vertical-slash, mean over the prompts, [heads]."""
        density = np.where(self.role == PIVOT, prices.pivot, self.density)
        saved = self.slash_density - density + prices.recall * (self.recall - self.slash_recall)
        return saved.mean(0)


def part_that_saves(dumps: list[Dump], group: Group, thresholds: Thresholds, prices: Prices) -> Group:
    """Returns the pivot that saves most, with those heads after it that save something and keep what shared heads must.
    Empty when no pivot pays.
    """
    best, most = (), 0.0
    for first in range(len(group) - 1):
        candidates = group[first:]
        served = GroupServed.of(dumps, candidates, thresholds)
        saved = served.saved(prices)
        joins = [
            i
            for i in range(1, len(candidates))
            if saved[i] > 0
            and served.shared[:, i].any()
            and shared_heads_hold(dumps, served.recall[:, i], served.shared[:, i], thresholds.gamma)
        ]
        total = saved[[0, *joins]].sum()
        if joins and total > most:
            best, most = tuple(candidates[i] for i in (0, *joins)), total
    return best


def parts_that_save(dumps: list[Dump], group: Group, thresholds: Thresholds, prices: Prices) -> list[Group]:
    """Returns the parts that save, one after the other, each from what the ones before leave."""
    parts = []
    while part := part_that_saves(dumps, group, thresholds, prices):
        parts.append(part)
        group = tuple(head for head in group if head not in part)
    return parts


@dataclass(frozen=True)
class Benefit:
    """The figures of a group of heads if it shares, mean over its heads and prompts. Exact heads have recall 1 and
    density 1.
    """

    heads: int
    shared: float  # share of the members that found the pivot near enough
    recall: float
    density: float
    member_recall: float  # of the members that shared
    member_density: float
    vertical_slash_recall: float  # of the same heads, at the same thresholds
    vertical_slash_density: float
    vertical_slash_recall_at_member_density: float  # what `member_density` buys, head by head
    vertical_slash_recall_at_member_density_worst: float
    saved: float  # by all its heads together, in density of one, recall at its price

    def wins(self, coverage: float) -> bool:
        """Tells whether sharing saves, the pivot's pass included, while vertical-slash at the members' cost fails one
        of them.
        """
        return self.shared > 0 and self.saved > 0 and self.vertical_slash_recall_at_member_density_worst < coverage


def benefit(dumps: list[Dump], group: Group, thresholds: Thresholds, prices: Prices) -> Benefit:
    served = GroupServed.of(dumps, group, thresholds)
    shared = served.shared
    of_shared = lambda values: float(values[shared].mean()) if shared.any() else float("nan")  # noqa: E731
    # The smallest floor buys most recall per block.
    rival = np.array(
        [
            [np.interp(cost, d.slash_density[h, 0], d.slash_recall[h, 0]) for h, cost in zip(group, density)]
            for d, density in zip(dumps, served.density)
        ]
    )
    of_head = [rival[shared[:, i], i].mean() for i in range(len(group)) if shared[:, i].any()]
    return Benefit(
        heads=len(group),
        shared=float(shared.sum()) / max(1, shared.size - len(dumps)),
        recall=float(served.recall.mean()),
        density=float(served.density.mean()),
        member_recall=of_shared(served.recall),
        member_density=of_shared(served.density),
        vertical_slash_recall=float(served.slash_recall.mean()),
        vertical_slash_density=float(served.slash_density.mean()),
        vertical_slash_recall_at_member_density=of_shared(rival),
        vertical_slash_recall_at_member_density_worst=float(min(of_head, default=1.0)),
        saved=float(served.saved(prices).sum()),
    )
