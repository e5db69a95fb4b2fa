#!/usr/bin/env python3
"""Pictures of an evaluation and of attention maps. Needs matplotlib and numpy.

    figures.py --summary build/evaluation/summary.json --out FOLDER
    figures.py --maps block_mass.npy --clusters model/tiny/head_clusters.json --out FOLDER

From a summary: score against density, needle depth x length, perplexity against dense, time to first
token. From block-mass maps: all heads, and each shared cluster with its pivot and the pivot's pattern.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import settings  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

COLOURS = {
    "dense": "#444444",
    "vertical_slash": "#d1602a",
    "share": "#1f6fb4",
    "auto": "#3a8f5a",
    "baseline_query_aware": "#8a5ab0",
    "baseline_random": "#a0a0a0",
}
MARKERS = "osD^vPX"
SCORE_COLOURS = "RdYlGn"


def _parsed(name: str) -> settings.Setting:
    return settings.parse(name)[0]


def _styles(families: list[str]) -> dict[str, dict]:
    """One colour per policy; the families of a policy differ by marker and line."""
    seen: dict[str, int] = defaultdict(int)
    styles = {}
    for family in families:
        policy = _parsed(family).policy
        number = seen[policy]
        seen[policy] += 1
        styles[family] = {
            "color": COLOURS[policy],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": ("-", "--", ":", "-.")[number % 4],
        }
    return styles


def _save(figure, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(folder / f"{name}.png")


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _lengths_across(axis, lengths: list[int], label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_length(n) for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _grid(rows: int, columns: int, width: float = 2.9, height: float = 2.4):
    return plt.subplots(
        rows, columns, figsize=(width * columns + 1, height * rows + 0.6), squeeze=False, constrained_layout=True
    )


# --- scores -----------------------------------------------------------------------------------------------------------


def score_against_density(summary: dict, folder: Path) -> None:
    """Rows are lengths, columns tasks, the last one their mean; a line joins the settings of one family."""
    cells = summary["tasks"] + [{**row, "task": "mean"} for row in summary["overall"]]
    lengths = sorted({c["length"] for c in cells})
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    curves = defaultdict(list)
    for cell in cells:
        curves[cell["length"], cell["task"], _parsed(cell["setting"]).family].append(cell)
    families = list(dict.fromkeys(family for _, _, family in curves))
    styles = _styles(families)
    figure, axes = _grid(len(lengths), len(tasks))
    for (length, task, family), points in curves.items():
        axis = axes[lengths.index(length)][tasks.index(task)]
        points.sort(key=lambda c: c["density"])
        scores = [p["score"] for p in points]
        if family == "dense":
            axis.axhline(scores[0]["value"], color=COLOURS["dense"], linewidth=1, label=family)
            axis.axhspan(scores[0]["low"], scores[0]["high"], color=COLOURS["dense"], alpha=0.1, linewidth=0)
            continue
        bars = [[s["value"] - s["low"] for s in scores], [s["high"] - s["value"] for s in scores]]
        axis.errorbar([p["density"] for p in points], [s["value"] for s in scores], bars,
                      label=family, markersize=4, linewidth=1.3, elinewidth=0.8, **styles[family])  # fmt: skip
    for row, length in zip(axes, lengths):
        for axis, task in zip(row, tasks):
            axis.set_title(f"{task}, {length}", fontsize=9)
            axis.set_xlim(0, 1.02)
            axis.set_ylim(-0.03, 1.05)
            axis.yaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(alpha=0.25)
        row[0].set_ylabel("right answers")
    for axis in axes[-1]:
        axis.set_xlabel("density (computed / causal blocks)")
    handles, labels = axes[-1][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
    _save(figure, folder, "score_against_density")


def needle_depths(summary: dict, folder: Path) -> None:
    """One picture per task: a depth x length map for every setting."""
    tasks = list(dict.fromkeys(c["task"] for c in summary["tasks"]))
    for task in tasks:
        cells = [c for c in summary["tasks"] if c["task"] == task]
        lengths = sorted({c["length"] for c in cells})
        depths = sorted({d["depth"] for c in cells for d in c["by_depth"]})
        names = list(dict.fromkeys(c["setting"] for c in cells))
        columns = min(4, len(names))
        figure, axes = _grid(-(-len(names) // columns), columns)
        for axis in axes.flat[len(names) :]:
            axis.axis("off")
        for axis, name in zip(axes.flat, names):
            table = [[float("nan")] * len(lengths) for _ in depths]
            for cell in (c for c in cells if c["setting"] == name):
                for entry in cell["by_depth"]:
                    row, column = depths.index(entry["depth"]), lengths.index(cell["length"])
                    table[row][column] = entry["right"] / entry["prompts"]
            image = axis.imshow(table, vmin=0, vmax=1, cmap=SCORE_COLOURS, aspect="auto")
            axis.set_title(name, fontsize=8)
            axis.set_xticks(range(len(lengths)), [_length(n) for n in lengths])
            axis.set_yticks(range(0, len(depths), 2), [f"{100 * d:.0f} %" for d in depths[::2]])
        for row in axes:
            row[0].set_ylabel("depth of the needle")
        figure.colorbar(image, ax=axes, format=PercentFormatter(1), label="right answers", shrink=0.8)
        figure.suptitle(f"{task}: depth against prompt length", fontsize=10)
        _save(figure, folder, f"needle_{task}")


def perplexity(summary: dict, folder: Path) -> None:
    cells = [c for c in summary["text"] if c["perplexity_to_dense"]]
    if not cells:
        return
    names = list(dict.fromkeys(c["setting"] for c in cells))
    styles = _styles(names)
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for place, name in enumerate(names):
        points = sorted((c for c in cells if c["setting"] == name), key=lambda c: c["length"])
        ratios = [p["perplexity_to_dense"] for p in points]
        bars = [[r["value"] - r["low"] for r in ratios], [r["high"] - r["value"] for r in ratios]]
        apart = 1.02 ** (place - len(names) / 2)  # intervals beside each other, not on top
        axis.errorbar([p["length"] * apart for p in points], [r["value"] for r in ratios], bars,
                      label=name, markersize=4, elinewidth=0.8, **styles[name])  # fmt: skip
    axis.axhline(1, color=COLOURS["dense"], linewidth=1)
    axis.set_ylabel("perplexity / dense")
    _lengths_across(axis, sorted({c["length"] for c in cells}), "position in the text")
    _save(figure, folder, "perplexity_by_position")


def time_to_first_token(summary: dict, folder: Path) -> None:
    names = list(dict.fromkeys(r["setting"] for r in summary["overall"]))
    styles = _styles(names)
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for name in names:
        rows = sorted((r for r in summary["overall"] if r["setting"] == name), key=lambda r: r["length"])
        axis.plot([r["length"] for r in rows], [r["ttft_ms"] for r in rows], label=name, markersize=4, **styles[name])
    axis.set_yscale("log")
    axis.set_ylabel(f"time to first token, ms ({summary['device']})")
    _lengths_across(axis, sorted({r["length"] for r in summary["overall"]}), "prompt tokens")
    _save(figure, folder, "time_to_first_token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", type=Path, help="summary.json of evaluate.py")
    parser.add_argument(
        "--maps", type=Path, help="block mass [layers, heads, n, n]: .npy, or .safetensors (see maps.py)"
    )
    parser.add_argument("--clusters", type=Path, help="head_clusters.json; gallery of its shared clusters")
    parser.add_argument("--gamma", type=float, default=0.9, help="mass that a drawn pattern covers")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args()
    if not (args.summary or args.maps):
        parser.error("nothing to draw: give --summary or --maps")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.summary:
        summary = json.loads(args.summary.read_text())
        if summary["tasks"]:
            score_against_density(summary, args.out)
            needle_depths(summary, args.out)
            time_to_first_token(summary, args.out)
        perplexity(summary, args.out)
    if args.maps:
        import maps

        block_mass = maps.load(args.maps)
        _save(maps.all_heads(block_mass), args.out, "block_mass")
        if args.clusters:
            clusters = maps.shared_clusters(json.loads(args.clusters.read_text()))
            _save(maps.gallery(block_mass, clusters, args.gamma), args.out, "cluster_gallery")


if __name__ == "__main__":
    main()
