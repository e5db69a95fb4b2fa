"""Block-mass maps of attention heads, drawn. Needs matplotlib and numpy.

A map is the causal [n, n] matrix of one head: row r, column c is the mean attention that the queries
of block r pay to the keys of block c; each row sums to 1.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

MOST_MEMBERS = 7  # of a cluster, beside its pivot
CLOSEST_TO_ZERO = 1e-4  # where the logarithmic colours begin


def load(path: Path) -> np.ndarray:
    """[layers, heads, n, n].

    .npy: that array. .safetensors: one tensor of that shape, or a tensor [heads, n, n] per layer with
    the layer's number in its name.
    """
    if path.suffix == ".npy":
        maps = np.load(path)
    else:
        from safetensors.numpy import load_file

        tensors = load_file(path)
        whole = [t for t in tensors.values() if t.ndim == 4]
        by_layer = {int(re.search(r"\d+", name)[0]): t for name, t in tensors.items() if t.ndim == 3}
        maps = whole[0] if whole else np.stack([by_layer[layer] for layer in sorted(by_layer)])
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3]:
        raise ValueError(f"{path}: shape {maps.shape}; [layers, heads, n, n] is needed")
    return maps.astype(np.float32)


def shared_clusters(file: dict) -> dict[str, list[tuple[int, int]]]:
    """Name -> (layer, head), the pivot (the first in order of layers) in front."""
    return {name: sorted(map(tuple, file["clusters"][name])) for name in file["shared_clusters"]}


def pattern(mass: np.ndarray, gamma: float) -> np.ndarray:
    """Bool [n, n]: per row the fewest blocks that hold gamma of it, block 0 and the diagonal."""
    order = np.argsort(-mass, axis=1, kind="stable")
    ordered = np.take_along_axis(mass, order, 1)
    keep = ordered.cumsum(1) - ordered < gamma * ordered.sum(1, keepdims=True)
    chosen = np.zeros_like(keep)
    np.put_along_axis(chosen, order, keep, 1)
    chosen[:, 0] = True
    return (chosen | np.eye(len(mass), dtype=bool)) & np.tri(len(mass), dtype=bool)


def recall(mass: np.ndarray, chosen: np.ndarray) -> float:
    """Share of a head's attention inside a pattern, mean over rows."""
    return float((mass * chosen).sum(1).mean())


def density(chosen: np.ndarray) -> float:
    return float(chosen.sum() / np.tri(len(chosen)).sum())


def _draw(axis, mass: np.ndarray, title: str) -> None:
    axis.imshow(np.log10(np.maximum(mass, CLOSEST_TO_ZERO)), cmap="magma", vmin=np.log10(CLOSEST_TO_ZERO), vmax=0)
    axis.set_title(title, fontsize=7)
    axis.set_xticks([])
    axis.set_yticks([])


def all_heads(maps: np.ndarray):
    layers, heads = maps.shape[:2]
    figure, axes = plt.subplots(
        layers, heads, figsize=(1.2 * heads, 1.35 * layers), squeeze=False, constrained_layout=True
    )
    for layer in range(layers):
        for head in range(heads):
            _draw(axes[layer][head], maps[layer, head], f"{layer}.{head}")
    figure.suptitle("block mass of every head (layer.head), logarithmic", fontsize=10)
    return figure


def gallery(maps: np.ndarray, clusters: dict[str, list[tuple[int, int]]], gamma: float):
    """A row per cluster: the pivot, its pattern, and members with the recall that this pattern gives them."""
    if not clusters:
        raise ValueError("the cluster file shares no cluster")
    columns = 2 + min(MOST_MEMBERS, max(len(members) for members in clusters.values()) - 1)
    figure, axes = plt.subplots(
        len(clusters), columns, figsize=(1.6 * columns, 1.9 * len(clusters)), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, (name, members) in zip(axes, clusters.items()):
        pivot = maps[members[0]]
        chosen = pattern(pivot, gamma)
        _draw(row[0], pivot, f"cluster {name}\npivot {members[0][0]}.{members[0][1]}")
        row[1].imshow(chosen, cmap="Greys", vmin=0, vmax=1)
        row[1].set_title(f"its pattern\ndensity {density(chosen):.2f}", fontsize=7)
        for axis, (layer, head) in zip(row[2:], members[1:]):
            _draw(axis, maps[layer, head], f"{layer}.{head}\nrecall {recall(maps[layer, head], chosen):.2f}")
        for axis in row[: 1 + len(members)]:
            axis.axis("on")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(f"shared clusters: pivot, its pattern at γ = {gamma}, members", fontsize=10)
    return figure
