"""Reads what prefill-calibrate recorded of one prompt, and derives the patterns that follow from it.

Heads are numbered layer * num_heads + head. Patterns and block mass are kept as the causal entries alone, row by row:
`Causal` maps them to (row, column, distance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from safetensors import safe_open

FORMAT = "prefilld-calibration-1"
# Vertical-slash is known at each of these budgets and gammas. Thresholds are tuned among them.
BUDGETS = (16, 32, 64, 128)  # least number of columns, and of diagonals
GAMMAS = np.round(np.concatenate([[0.1, 0.2, 0.3, 0.4], np.arange(0.5, 1.0, 0.025), [1.0]]), 3)
SAME_BLOCKS = 0.02  # what this step and the program may differ by, from the order of sums
HEADS_AT_ONCE = 64  # of a large model: their patterns in fp32 take as much memory as their maps
LARGEST_DISTANCE = np.sqrt(np.log(2.0))


@dataclass(frozen=True, eq=False)
class Causal:
    """The n (n + 1) / 2 causal entries of an n x n map."""

    n: int
    row: np.ndarray
    column: np.ndarray

    @staticmethod
    @lru_cache(maxsize=None)
    def of(n: int) -> Causal:
        return Causal(n, *np.tril_indices(n))

    @cached_property
    def distance(self) -> np.ndarray:
        return self.row - self.column

    @cached_property
    def forced(self) -> np.ndarray:
        """Returns the entries that every pattern has: block 0 and the diagonal."""
        return (self.column == 0) | (self.distance == 0)

    @cached_property
    def last_row(self) -> slice:
        return slice(len(self.row) - self.n, None)


def smallest_set(mass: np.ndarray, gamma: float) -> np.ndarray:
    """Returns, per row (last axis), the fewest entries that reach gamma of the row's sum, as bool of the same shape.
    Ties go by index.
    """
    order = np.argsort(-mass, axis=-1, kind="stable")
    ordered = np.take_along_axis(mass, order, -1).astype(np.float64)
    before = ordered.cumsum(-1) - ordered
    chosen = np.zeros(mass.shape, bool)
    np.put_along_axis(chosen, order, before < gamma * ordered.sum(-1, keepdims=True), -1)
    return chosen


def js_distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Returns the Jensen-Shannon distance in nats over the last axis, 0 to LARGEST_DISTANCE, with 0 ln 0 = 0."""
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / middle), 0) + np.where(q > 0, q * np.log(q / middle), 0)
    return np.sqrt(np.maximum(terms.sum(-1) / 2, 0))


def first_places(values: np.ndarray, n: int) -> np.ndarray:
    """Returns where each of 0 .. n - 1 stands first, [n], or len(values) where it does not. Values up to n may occur."""
    places = np.full(n + 1, len(values))
    places[values[::-1]] = np.arange(len(values))[::-1]  # of an index that returns, the last assignment holds
    return places[:n]


class VerticalSlash:
    """One head's vertical-slash sets for any gamma, kept as the rank at which each block column and block diagonal
    enters.
    """

    def __init__(self, vertical: np.ndarray, slash: np.ndarray, block: int):
        length = len(vertical)
        n = -(-length // block)
        self._sums, self._ranks = [], []
        for mass, both_sides in ((vertical, False), (slash, True)):
            order = np.argsort(-mass, kind="stable")
            self._sums.append(mass[order].astype(np.float64).cumsum())
            first = first_places(order // block, n)
            if both_sides:  # a diagonal off the block grid crosses two block diagonals
                off_grid = np.where(order % block != 0, order // block + 1, n)
                first = np.minimum(first, first_places(off_grid, n))
            first[0] = -1  # column 0 and the main diagonal always
            self._ranks.append(first)

    def counts(self, gamma: float, min_budget: int) -> tuple[int, int]:
        """Returns the numbers of columns and of diagonals, in tokens."""
        columns, diagonals = (
            min(len(sums), max(min_budget, 1 + int(np.searchsorted(sums, gamma * sums[-1])))) for sums in self._sums
        )
        return columns, diagonals

    def pattern(self, counts: tuple[int, int], causal: Causal) -> np.ndarray:
        columns, diagonals = (ranks < count for ranks, count in zip(self._ranks, counts))
        return columns[causal.column] | diagonals[causal.distance]


@dataclass(frozen=True)
class Patterns:
    """The patterns of all heads of a prompt at one gamma."""

    held: np.ndarray  # [whose pattern, whose attention]: the part inside, mean over the rows
    density: np.ndarray  # [heads]
    last_row: np.ndarray  # [heads, n] bool
    by_estimate: np.ndarray  # [heads, n] bool: what a head that shares adds to the last row


class Dump:
    """The dump of one prompt: `mass` [heads, causal entries], `estimate` [heads, n], and the heads' vertical-slash sets
    as `slash_recall` and `slash_density` [heads, budgets, gammas].
    """

    def __init__(self, path: Path):
        self.path = path
        with safe_open(str(path), "np") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ValueError(f"{path}: format {facts.get('format')!r}; {FORMAT!r} is needed")
            self.fingerprint, self.domain, self.prompt = (
                facts[key] for key in ("model_fingerprint", "domain", "prompt")
            )
            number = {key: int(facts[key]) for key in ("num_layers", "num_heads", "num_tokens")}
            self.num_layers, self.num_heads, self.num_tokens = number.values()
            self.block_tokens, cell_blocks = int(facts["block_tokens"]), int(facts["cell_blocks"])
            self.block = self.block_tokens * cell_blocks  # a map's cell is a block for all that follows
            self.n = -(-self.num_tokens // self.block)
            self.causal = Causal.of(self.n)
            self._patterns: dict[float, Patterns] = {}
            self._read(file, cell_blocks, float(facts["gamma"]), int(facts["min_budget_tokens"]))

    def _read(self, file, cell_blocks: int, gamma: float, min_budget: int) -> None:
        masses, estimates, recall, density = [], [], [], []
        at_gamma, recorded = [], []
        for layer in range(self.num_layers):
            get = lambda name: file.get_tensor(f"layers.{layer}.{name}")  # noqa: E731, B023
            mass = get("block_mass")[:, self.causal.row, self.causal.column]
            masses.append(mass)
            estimate = get("estimate")
            estimates.append(np.add.reduceat(estimate, np.arange(0, estimate.shape[1], cell_blocks), axis=1))
            for of_head, vertical, slash in zip(mass, get("vertical"), get("slash")):
                sets = VerticalSlash(vertical, slash, self.block)

                @lru_cache(maxsize=None)  # many thresholds give the same set
                def figures(counts: tuple[int, int], of_head=of_head, sets=sets) -> tuple[float, float]:
                    pattern = sets.pattern(counts, self.causal)
                    return float(of_head[pattern].sum()) / self.n, float(pattern.mean())

                curves = [[figures(sets.counts(g, budget)) for g in GAMMAS] for budget in BUDGETS]
                recall.append([[r for r, _ in curve] for curve in curves])
                density.append([[d for _, d in curve] for curve in curves])
                at_gamma.append(figures(sets.counts(gamma, min_budget)))
            recorded += zip(get("vertical_slash_mass"), get("vertical_slash_density"))
        self.mass, self.estimate = np.concatenate(masses), np.concatenate(estimates)
        self.last_row_mass = np.ascontiguousarray(self.mass[:, self.causal.last_row])
        self.slash_recall, self.slash_density = np.array(recall), np.array(density)
        if cell_blocks == 1:
            self._expect_agreement(np.array(at_gamma), np.array(recorded))

    def _expect_agreement(self, here: np.ndarray, recorded: np.ndarray) -> None:
        """Checks that our vertical-slash sets are those that the program measured, which it would serve."""
        head = int(np.abs(here - recorded).max(1).argmax())
        if np.abs(here[head] - recorded[head]).max() > SAME_BLOCKS:
            raise ValueError(
                f"{self.path}: vertical-slash of layer {head // self.num_heads}, head {head % self.num_heads} has "
                f"(mass, density) {recorded[head].round(4)} there and {here[head].round(4)} here: "
                "the file is damaged, or made by a program of another version"
            )

    @cached_property
    def from_uniform(self) -> np.ndarray:
        """Returns the distance of each estimate from uniform, [heads]."""
        return js_distance(self.estimate, np.float32(1 / self.n))

    def square(self, head: int) -> np.ndarray:
        """Returns a head's block mass as [n, n]."""
        square = np.zeros((self.n, self.n), np.float32)
        square[self.causal.row, self.causal.column] = self.mass[head]
        return square

    def pivot_pattern(self, head: int, gamma: float) -> np.ndarray:
        """Returns, per row, the smallest set of blocks that holds gamma of it, with block 0 and the diagonal."""
        chosen = smallest_set(self.square(head), gamma)
        return chosen[self.causal.row, self.causal.column] | self.causal.forced

    def patterns(self, gamma: float) -> Patterns:
        """Measures every head's pattern on every head, by one product of matrices: what shares is tried over and over."""
        if gamma not in self._patterns:
            held, last_row, density = [], [], []
            for start in range(0, len(self.mass), HEADS_AT_ONCE):
                heads = range(start, min(start + HEADS_AT_ONCE, len(self.mass)))
                chosen = np.stack([self.pivot_pattern(head, gamma) for head in heads])
                held.append(chosen.astype(np.float32) @ self.mass.T / self.n)
                last_row.append(chosen[:, self.causal.last_row])
                density.append(chosen.mean(1))
            joined = (np.concatenate(parts) for parts in (held, density, last_row))
            self._patterns[gamma] = Patterns(*joined, smallest_set(self.estimate, gamma))
        return self._patterns[gamma]


def load(paths: list[Path], progress: Callable[[str], None] = lambda text: None) -> list[Dump]:
    """Loads the dumps of all files and folders, which must be of one model and block size, sorted by domain and name.
    """
    files = sorted({file for path in paths for file in (path.rglob("*.safetensors") if path.is_dir() else [path])})
    if not files:
        raise ValueError(f"no .safetensors files in {', '.join(map(str, paths))}")
    dumps = []
    for file in files:
        progress(f"reading {file.name}")
        dumps.append(Dump(file))
    dumps.sort(key=lambda d: (d.domain, d.prompt))
    for dump in dumps[1:]:
        for name in ("fingerprint", "num_layers", "num_heads", "block_tokens"):
            if getattr(dump, name) != getattr(dumps[0], name):
                raise ValueError(
                    f"{dump.path}: {name} {getattr(dump, name)}, but {getattr(dumps[0], name)} in {dumps[0].path}"
                )
    return dumps
