"""Finds heads that attend alike: turns maps into vectors and vectors into groups, and measures how well groups agree.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from dumps import Dump
from simulation import Group

GRID = 64  # maps of prompts of any length are compared on this grid
FLOOR = 1e-5  # of mass, before the logarithm
VARIANCE = 0.95  # that the components keep
MOST_COMPONENTS = 64
PAIRS = 400  # per prompt, for the overlap of patterns


def overlap_of_intervals(many: int, few: int) -> np.ndarray:
    """Returns the share of each of `many` equal intervals that lies in each of `few`, as [few, many]."""
    edges = np.minimum(np.arange(1, few + 1)[:, None] / few, np.arange(1, many + 1) / many)
    starts = np.maximum(np.arange(few)[:, None] / few, np.arange(many) / many)
    return np.maximum(edges - starts, 0) * many


def pooled_log_mass(dump: Dump, grid: int) -> np.ndarray:
    """Averages rows and sums columns onto the grid, so that a row keeps the sum 1, then takes the logarithm. [heads,
    causal cells of the grid].
    """
    columns = overlap_of_intervals(dump.n, grid)
    rows = columns / columns.sum(1, keepdims=True)
    lower = np.tril_indices(grid)
    pooled = (np.log((rows @ dump.square(head) @ columns.T)[lower] + FLOOR) for head in range(len(dump.mass)))
    return np.stack(list(pooled)).astype(np.float32)


def embed(features: np.ndarray) -> np.ndarray:
    """Reduces [heads, values] to [heads, components]: the principal components that keep VARIANCE of the variance."""
    centred = features - features.mean(0)
    # There are few heads and many values, so the components come from the Gram matrix.
    variance, vectors = np.linalg.eigh(centred.astype(np.float64) @ centred.T)
    variance, vectors = np.maximum(variance[::-1], 0), vectors[:, ::-1]
    if variance.sum() == 0:
        return np.zeros((len(features), 1))
    kept = 1 + int(np.searchsorted(variance.cumsum(), VARIANCE * variance.sum()))
    kept = min(kept, MOST_COMPONENTS, len(features))
    return vectors[:, :kept] * np.sqrt(variance[:kept])


def tree_of(features: list[np.ndarray]) -> np.ndarray:
    """Links the heads by average linkage. `features` has [heads, values] of each prompt."""
    return linkage(embed(np.concatenate(features, axis=1)), method="average")


def cut_at(tree: np.ndarray, share: float) -> np.ndarray:
    """Labels the heads, [heads], by groups that were joined below `share` of the largest distance."""
    return fcluster(tree, share * tree[:, 2].max(), criterion="distance")


def cut_into(tree: np.ndarray, count: int) -> np.ndarray:
    return fcluster(tree, count, criterion="maxclust")


def groups_of(labels: np.ndarray, smallest: int) -> list[Group]:
    """Returns the groups of at least `smallest` heads, largest first. Smaller ones count as noise."""
    groups = [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
    return sorted((g for g in groups if len(g) >= smallest), key=lambda g: (-len(g), g))


def adjusted_rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Returns 1 for the same groups, and 0 for groups that agree as well as chance makes them. NaN where chance alone
    makes them the same, as when all heads are one group.
    """
    pairs = lambda counts: float((counts * (counts - 1) / 2).sum())  # noqa: E731
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / pairs(np.array([len(a)]))
    most = (rows + columns) / 2
    return math.nan if most == expected else (both - expected) / (most - expected)


def stability(features: dict[str, list[np.ndarray]], count: int) -> dict[str, float]:
    """Returns the adjusted Rand index of `count` parts by one domain against those by another. To show what other
    prompts of the same domain change, it does the same with two halves of each domain that has them ("prose/prose").
    """
    labels = {domain: cut_into(tree_of(maps), count) for domain, maps in features.items()}
    found = {
        f"{a}/{b}": adjusted_rand_index(labels[a], labels[b]) for a, b in itertools.combinations(sorted(labels), 2)
    }
    for domain, maps in features.items():
        if len(maps) > 1:
            halves = (cut_into(tree_of(maps[start::2]), count) for start in (0, 1))
            found[f"{domain}/{domain}"] = adjusted_rand_index(*halves)
    return found


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def pattern_overlap(
    dumps: list[Dump], shared: list[Group], groups: list[Group], gamma: float
) -> tuple[float, float]:
    """Returns the Jaccard index of patterns at gamma: (members of groups that share with their group's first head,
    heads of different groups).
    """
    random = np.random.default_rng(1)
    alike, unlike = [], []
    for dump in dumps:
        pattern = {head: dump.pivot_pattern(head, gamma) for group in groups for head in group}
        alike += [jaccard(pattern[g[0]], pattern[head]) for g in shared for head in g[1:]]
        for _ in range(PAIRS if len(groups) > 1 else 0):
            a, b = random.choice(len(groups), 2, replace=False)
            unlike.append(jaccard(pattern[random.choice(groups[a])], pattern[random.choice(groups[b])]))
    mean = lambda values: float(np.mean(values)) if values else float("nan")  # noqa: E731
    return mean(alike), mean(unlike)
