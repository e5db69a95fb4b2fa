"""Pictures of one recorded prompt: block mass of every head, the patterns chosen from it, the shared clusters.

Reads what prefill-calibrate wrote and decides as model/calibration simulates the server. Needs
matplotlib, numpy and safetensors. A map is causal: row r, column c is the mean attention that the
queries of block r pay to the keys of block c; each row sums to 1.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2] / "model" / "calibration"))
import simulation  # noqa: E402
from dumps import Dump, VerticalSlash, smallest_set  # noqa: E402
from simulation import PIVOT, SHARED, VERTICAL_SLASH  # noqa: E402

LEAST_MASS = 1e-4  # where the logarithmic colours begin
MASS_COLOURS = plt.get_cmap("magma_r", 24)
ROLES = {
    PIVOT: ("pivot: all blocks computed, its pattern darker", "#333333"),
    SHARED: ("shared: the pivot's pattern", "#0072B2"),
    VERTICAL_SLASH: ("vertical-slash", "#D55E00"),
}
LEFT_OUT, FUTURE = to_rgb("#ececec"), to_rgb("white")
MOST_MEMBERS = 7  # of a cluster, beside its pivot


@dataclass
class Prompt:
    """A dump with the decisions that the server would make on it."""

    dump: Dump
    cluster_of: dict[int, str]  # head -> its cluster
    groups: dict[str, tuple[int, ...]]  # clusters with a pivot; heads in order, so it comes first
    thresholds: simulation.Thresholds
    served: simulation.Served
    patterns: list[np.ndarray]  # per head, over the dump's causal entries

    def name(self, head: int) -> str:
        return f"{head // self.dump.num_heads}.{head % self.dump.num_heads}"

    def pivot(self, group: tuple[int, ...]) -> int:
        return next((head for head in group if self.served.role[head] == PIVOT), group[0])

    def sharing(self) -> dict[str, tuple[int, ...]]:
        """Returns the groups that share. A head with a cluster of its own is computed exactly and gives its pattern to
        no other.
        """
        return {name: group for name, group in self.groups.items() if len(group) > 1}


def read(path: Path, clusters: dict) -> Prompt:
    dump = Dump(path)
    flat = {
        name: tuple(sorted(layer * dump.num_heads + head for layer, head in heads))
        for name, heads in clusters["clusters"].items()
    }
    groups = {name: flat[name] for name in clusters["shared_clusters"]}
    known = {field.name for field in dataclasses.fields(simulation.Thresholds)}
    tuned = clusters.get("thresholds", {})
    thresholds = simulation.Thresholds(**{name: value for name, value in tuned.items() if name in known})
    prompt = Prompt(
        dump=dump,
        cluster_of={head: name for name, heads in flat.items() for head in heads},
        groups=groups,
        thresholds=thresholds,
        served=simulation.serve(dump, groups.values(), thresholds),
        patterns=_vertical_slash(dump, tuned.get("vertical_slash_gamma", thresholds.gamma), thresholds),
    )
    for group in groups.values():
        pattern = dump.pivot_pattern(prompt.pivot(group), thresholds.gamma)
        for head in (h for h in group if prompt.served.role[h] != VERTICAL_SLASH):
            prompt.patterns[head] = _with_last_row(dump, head, pattern, thresholds.gamma)
    return prompt


def _vertical_slash(dump: Dump, gamma: float, thresholds: simulation.Thresholds) -> list[np.ndarray]:
    patterns = []
    with safe_open(str(dump.path), "np") as file:
        for layer in range(dump.num_layers):
            vertical, slash = (file.get_tensor(f"layers.{layer}.{name}") for name in ("vertical", "slash"))
            for head in range(dump.num_heads):
                sets = VerticalSlash(vertical[head], slash[head], dump.block)
                patterns.append(sets.pattern(sets.counts(gamma, thresholds.min_budget_tokens), dump.causal))
    return patterns


def _with_last_row(dump: Dump, head: int, pattern: np.ndarray, gamma: float) -> np.ndarray:
    """Adds to a head that shares what its own estimate finds in the last row."""
    pattern = pattern.copy()
    pattern[dump.causal.last_row] |= smallest_set(dump.estimate[[head]], gamma)[0]
    return pattern


# --- tiles: [n, n, 3] -------------------------------------------------------------------------------------------------


def _tile(dump: Dump, colours: np.ndarray) -> np.ndarray:
    """Draws one map. colours: [causal entries, 3]."""
    tile = np.full((dump.n, dump.n, 3), FUTURE, np.float32)
    tile[dump.causal.row, dump.causal.column] = colours
    return tile


def _mass_tile(dump: Dump, head: int) -> np.ndarray:
    height = 1 - np.log10(np.clip(dump.mass[head], LEAST_MASS, 1)) / np.log10(LEAST_MASS)
    return _tile(dump, MASS_COLOURS(height)[:, :3])


def _pattern_tile(prompt: Prompt, head: int, role: int) -> np.ndarray:
    colour = np.array(to_rgb(ROLES[role][1]))
    left_out = 0.6 + 0.4 * colour if role == PIVOT else np.array(LEFT_OUT)
    return _tile(prompt.dump, np.where(prompt.patterns[head][:, None], colour, left_out))


def _mosaic(prompt: Prompt, tiles: list[np.ndarray], notes: list[str], title: str):
    """Draws all heads, a row per layer. A note stands in the empty corner of each tile."""
    dump = prompt.dump
    n, step = dump.n, dump.n + max(2, dump.n // 12)
    picture = np.ones((step * dump.num_layers, step * dump.num_heads, 3), np.float32)
    for head, tile in enumerate(tiles):
        top, left = head // dump.num_heads * step, head % dump.num_heads * step
        picture[top : top + n, left : left + n] = tile
    size = (1.05 * dump.num_heads + 0.8, 1.05 * dump.num_layers + 0.5)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(picture, interpolation="none")
    for head, note in enumerate(notes):
        top, left = head // dump.num_heads * step, head % dump.num_heads * step
        axis.text(left + n - 1, top + 1, note, fontsize=7, ha="right", va="top", color="#333333")
    axis.set_xticks([i * step + n / 2 for i in range(dump.num_heads)], [f"head {i}" for i in range(dump.num_heads)])
    axis.set_yticks([i * step + n / 2 for i in range(dump.num_layers)], [f"layer {i}" for i in range(dump.num_layers)])
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure, axis


def block_mass(prompt: Prompt):
    heads = range(len(prompt.patterns))
    sharing = sum(prompt.sharing().values(), ())
    marks = {head: " s" if head in sharing else " e" for group in prompt.groups.values() for head in group}
    notes = [prompt.cluster_of.get(h, "–") + marks.get(h, "") for h in heads]
    figure, axis = _mosaic(
        prompt, [_mass_tile(prompt.dump, h) for h in heads], notes,
        f"Attention by blocks of {prompt.dump.block} tokens, {prompt.dump.num_tokens} tokens; "
        "in the corner the head's cluster, s: it shares, e: it is exact",
    )  # fmt: skip
    _mass_bar(figure, axis)
    return figure


def _mass_bar(figure, axes) -> None:
    scale = plt.cm.ScalarMappable(plt.matplotlib.colors.LogNorm(LEAST_MASS, 1), MASS_COLOURS)
    bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.5, pad=0.02, aspect=40)
    bar.set_label("mean share of a query's attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def chosen_patterns(prompt: Prompt):
    roles, density = prompt.served.role, prompt.served.density
    tiles = [_pattern_tile(prompt, head, role) for head, role in enumerate(roles)]
    notes = [f"{1.0 if role == PIVOT else pattern.mean():.2f}" for role, pattern in zip(roles, prompt.patterns)]
    figure, _ = _mosaic(
        prompt, tiles, notes,
        f"What share computes, γ {prompt.thresholds.gamma:g}; in the corner the head's density; "
        f"{density.mean():.2f} in all",
    )  # fmt: skip
    handles = [Patch(color=colour, label=label) for label, colour in ROLES.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def cluster_gallery(prompt: Prompt):
    """Draws a row per shared cluster: the pivot, its pattern, and members with the share of their attention that it
    holds.
    """
    groups = prompt.sharing()
    columns = 2 + min(MOST_MEMBERS, max(len(group) for group in groups.values()) - 1)
    rows = len(groups)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.15 * columns + 0.8, 1.45 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, group) in zip(axes, groups.items()):
        pivot = prompt.pivot(group)
        over = simulation.over_pivot(prompt.dump, group, pivot, prompt.thresholds.gamma)
        _show(row[0], _mass_tile(prompt.dump, pivot), f"cluster {name}\npivot {prompt.name(pivot)}")
        _show(row[1], _pattern_tile(prompt, pivot, SHARED), f"its pattern\ndensity {over.pattern_density:.2f}")
        members = [(head, recall) for head, recall in zip(group, over.recall) if head != pivot]
        for axis, (head, recall) in zip(row[2:], members):
            apart = "" if prompt.served.role[head] == SHARED else ", apart"
            _show(axis, _mass_tile(prompt.dump, head), f"{prompt.name(head)}{apart}\nrecall {recall:.2f}")
    _mass_bar(figure, axes)
    figure.suptitle(
        f"Clusters that share (layer.head): pivot, its pattern at γ {prompt.thresholds.gamma:g}, and how much of the "
        "members' attention it holds", fontsize=10,
    )  # fmt: skip
    return figure


def _show(axis, tile: np.ndarray, title: str) -> None:
    axis.axis("on")
    axis.imshow(tile, interpolation="none")
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color("#bbbbbb")


def draw(path: Path, clusters: dict) -> Iterator[tuple[str, plt.Figure]]:
    prompt = read(path, clusters)
    yield "block_mass", block_mass(prompt)
    yield "chosen_patterns", chosen_patterns(prompt)
    if prompt.sharing():
        yield "cluster_gallery", cluster_gallery(prompt)
