"""Pictures of a summary: score against density, needle depth x length, perplexity. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import matplotlib.pyplot as plt
import settings
from matplotlib.ticker import MultipleLocator, PercentFormatter
from scoring import DENSE, SHARE
from settings import THRESHOLDS

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = {
    "dense": "#333333",
    "vertical_slash": "#D55E00",
    "share": "#0072B2",
    "auto": "#009E73",
    "baseline_query_aware": "#CC79A7",
    "baseline_random": "#8A8A8A",
}
POLICIES = {"vertical_slash": "vertical-slash", "baseline_query_aware": "query-aware", "baseline_random": "random"}
SYMBOLS = {"gamma": "γ", "vertical_slash_gamma": "γ of v.-s.", "tau": "τ", "delta": "δ", "min_budget_tokens": "floor"}
MARKERS = {"vertical_slash": "s", "share": "o", "auto": "D", "baseline_query_aware": "^", "baseline_random": "X"}
LINES = ("-", "--", ":", "-.")
SCORES = "Blues"  # what is missed stays white
WITHIN = 0.01  # of dense: what counts as having kept the answers


def draw(summary: dict) -> Iterator[tuple[str, plt.Figure]]:
    if summary["tasks"]:
        yield "score_against_density", score_against_density(summary)
        if any("by_depth" in c for c in summary["tasks"]):
            yield "needle_depths", needle_depths(summary)
    if any(c["perplexity_to_dense"] for c in summary["text"]):
        yield "perplexity", perplexity(summary)


def _parsed(name: str) -> settings.Setting:
    return settings.parse(name)[0]


def _label(name: str) -> tuple[str, str]:
    """share:gamma=0.5,tau=0.4 -> share and γ 0.5, τ 0.4"""
    setting = _parsed(name)
    thresholds = dict(setting.thresholds)
    words = [f"{SYMBOLS.get(n, n.replace('_', ' '))} {thresholds[n]:g}" for n in THRESHOLDS if n in thresholds]
    return POLICIES.get(setting.policy, setting.policy), ", ".join(words)


def _in_legend(name: str) -> str:
    return ", ".join(filter(None, _label(name)))


def _task(name: str) -> str:
    return name.replace("_", " ")


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _in_order(values) -> list:
    return list(dict.fromkeys(values))


def _styles(families: list[str]) -> dict[str, dict]:
    """One colour and marker per policy; the families of a policy differ by line and by what fills the marker."""
    seen: dict[str, int] = defaultdict(int)
    styles = {}
    for family in families:
        policy = _parsed(family).policy
        number = seen[policy]
        seen[policy] += 1
        styles[family] = {
            "color": COLOURS[policy],
            "marker": MARKERS.get(policy, "o"),
            "linestyle": LINES[number % len(LINES)],
            "markerfacecolor": COLOURS[policy] if number % 2 == 0 else "white",
            "zorder": 4 if policy == SHARE else 3,
        }
    return styles


def _grid(rows: int, columns: int, width: float, height: float):
    return plt.subplots(
        rows, columns, figsize=(width * columns + 0.7, height * rows + 0.6), squeeze=False, layout="constrained",
        sharex=True, sharey=True,
    )  # fmt: skip


# --- scores -----------------------------------------------------------------------------------------------------------


def score_against_density(summary: dict) -> plt.Figure:
    """Rows are lengths, columns tasks, the last one their mean; a line joins the settings of one family."""
    cells = list(summary["tasks"])
    tasks = _in_order(c["task"] for c in cells)
    if len(tasks) > 1:
        cells += [{**row, "task": "mean"} for row in summary["overall"]]
        tasks.append("mean")
    lengths = sorted({c["length"] for c in cells})
    points = defaultdict(list)
    for cell in cells:
        points[cell["length"], cell["task"], _parsed(cell["setting"]).family].append(cell)
    styles = _styles(_in_order(family for _, _, family in points))
    figure, axes = _grid(len(lengths), len(tasks), 2.3, 1.9)
    for (length, task, family), curve in points.items():
        _draw_curve(axes[lengths.index(length)][tasks.index(task)], family, curve, styles[family])
    for row, length in zip(axes, lengths):
        row[0].set_ylabel(f"{_length(length)} tokens")
        row[0].yaxis.set_major_formatter(PercentFormatter(1))
        for axis in row:
            axis.grid(color="#dddddd", linewidth=0.6)
    for axis, task in zip(axes[0], tasks):
        axis.set_title(_task(task), fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("density")
    sparse = [c["density"] for c in cells if c["setting"] != DENSE]
    axes[0][0].set_xlim(0, 1.06 * max(sparse, default=1))
    axes[0][0].set_ylim(top=1.03)
    axes[0][0].xaxis.set_major_locator(MultipleLocator(0.1))
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Right answers against density (computed / causal blocks); bars: 95 %", fontsize=11)
    return figure


def _draw_curve(axis, family: str, curve: list[dict], style: dict) -> None:
    curve = sorted(curve, key=lambda c: c["density"])
    scores = [c["score"] for c in curve]
    if family == DENSE:
        axis.axhline(scores[0]["value"], color=COLOURS[DENSE], linewidth=1, label=DENSE, zorder=1)
        axis.axhspan(scores[0]["low"], scores[0]["high"], color=COLOURS[DENSE], alpha=0.1, linewidth=0, zorder=0)
        return
    bars = [[s["value"] - s["low"] for s in scores], [s["high"] - s["value"] for s in scores]]
    axis.errorbar([c["density"] for c in curve], [s["value"] for s in scores], bars, label=_in_legend(family),
                  markersize=4, linewidth=1.3, elinewidth=0.7, **style)  # fmt: skip


def compared_settings(summary: dict) -> list[str]:
    """dense; the sparsest share that stays within a point of it; of every other family the setting nearest in density."""
    density, difference = defaultdict(list), defaultdict(list)
    for row in summary["overall"]:
        density[row["setting"]].append(row["density"])
        if row["minus_dense"]:
            difference[row["setting"]].append(row["minus_dense"]["value"])
    density = {name: sum(values) / len(values) for name, values in density.items()}
    shares = sorted((n for n in density if _parsed(n).policy == SHARE), key=density.get)
    if not shares:
        return list(density)
    kept = [n for n in shares if difference[n] and min(difference[n]) >= -WITHIN]
    share = (kept or shares[-1:])[0]
    families = defaultdict(list)
    for name in density:
        if _parsed(name).policy != SHARE:
            families[_parsed(name).family].append(name)
    families[SHARE] = [share]
    nearest = [min(names, key=lambda n: abs(density[n] - density[share])) for names in families.values()]
    policies = [DENSE, SHARE, *COLOURS]
    return sorted(nearest, key=lambda n: policies.index(_parsed(n).policy))


def needle_depths(summary: dict) -> plt.Figure:
    """Rows are tasks, columns settings of about one density; in each, the needle's depth against the prompt's length."""
    names = compared_settings(summary)
    cells = {(c["task"], c["setting"], c["length"]): c for c in summary["tasks"]}
    tasks = _in_order(task for task, _, _ in cells)
    lengths = sorted({length for _, _, length in cells})
    depths = sorted({d["depth"] for c in cells.values() for d in c["by_depth"]})
    figure, axes = _grid(len(tasks), len(names), 1.75, 1.75)
    for row, task in zip(axes, tasks):
        for axis, name in zip(row, names):
            image = axis.imshow(
                [[_right(cells.get((task, name, length)), depth) for length in lengths] for depth in depths],
                vmin=0, vmax=1, cmap=SCORES, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            axis.set_xticks(range(len(lengths)), [_length(n) for n in lengths])
            axis.set_yticks(range(0, len(depths), 2), [f"{100 * d:.0f} %" for d in depths[::2]])
            axis.tick_params(labelsize=8, length=2)
        row[0].set_ylabel(f"{_task(task)}\ndepth", fontsize=9)
    for axis, name in zip(axes[0], names):
        rows = [r["density"] for r in summary["overall"] if r["setting"] == name]
        policy, thresholds = _label(name)
        own = thresholds + "\n" if thresholds and _parsed(name).policy != "baseline_random" else ""
        axis.set_title(f"{policy}\n{own}density {sum(rows) / len(rows):.2f}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1), shrink=0.6, pad=0.01)
    bar.set_label("right answers", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle("Where the needle lies (0 %: start of the prompt) against prompt length in tokens", fontsize=11)
    return figure


def _right(cell: dict | None, depth: float) -> float:
    for entry in cell["by_depth"] if cell else []:
        if entry["depth"] == depth:
            return entry["right"] / entry["prompts"]
    return float("nan")


def perplexity(summary: dict) -> plt.Figure:
    cells = [c for c in summary["text"] if c["perplexity_to_dense"]]
    names = _in_order(c["setting"] for c in cells)
    lengths = sorted({c["length"] for c in cells})
    styles = _styles(names)
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    for place, name in enumerate(names):
        points = sorted((c for c in cells if c["setting"] == name), key=lambda c: c["length"])
        ratios = [p["perplexity_to_dense"] for p in points]
        bars = [[r["value"] - r["low"] for r in ratios], [r["high"] - r["value"] for r in ratios]]
        apart = 0.7 / len(names) * (place - (len(names) - 1) / 2)  # intervals beside each other, not on top
        axis.errorbar([lengths.index(p["length"]) + apart for p in points], [r["value"] for r in ratios], bars,
                      label=_in_legend(name), markersize=4, elinewidth=0.8, **{**styles[name], "linestyle": ""})  # fmt: skip
    axis.axhline(1, color=COLOURS[DENSE], linewidth=1)
    axis.set_xticks(range(len(lengths)), [_length(n) for n in lengths])
    axis.set_xlabel("position in held-out text")
    axis.set_ylabel("perplexity / dense")
    axis.grid(color="#dddddd", linewidth=0.6, axis="y")
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
