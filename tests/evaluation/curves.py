"""Pictures of a summary: score against density, needle depth x length, perplexity. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import matplotlib.pyplot as plt
import settings
from matplotlib.ticker import MultipleLocator, PercentFormatter
from scoring import DENSE, SHARE
from settings import THRESHOLDS
from table import ASKED

# These are the colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {
    "dense": "#333333",
    "vertical_slash": "#D55E00",
    "share": "#0072B2",
    "auto": "#009E73",
    "baseline_query_aware": "#CC79A7",
    "baseline_random": "#8A8A8A",
    # These are rules of real_weights/rules.py.
    "antidiagonal": "#56B4E9",
    "flash_prefill": "#E69F00",
    "best_blocks": "#000000",
}
POLICIES = {"vertical_slash": "vertical-slash", "baseline_query_aware": "query-aware", "baseline_random": "random",
            "antidiagonal": "share's rule in PyTorch", "flash_prefill": "FlashPrefill", "best_blocks": "best blocks"}  # fmt: skip
SYMBOLS = {"gamma": "γ", "vertical_slash_gamma": "γ of v.-s.", "tau": "τ", "delta": "δ", "min_budget_tokens": "floor",
           "last_rows_gamma": "last rows", "alpha": "α", "mean_of_rest": "means of the rest"}  # fmt: skip
MARKERS = {"vertical_slash": "s", "share": "o", "auto": "D", "baseline_query_aware": "^", "baseline_random": "X",
           "flash_prefill": "v", "best_blocks": "*"}  # fmt: skip
LINES = ("-", "--", ":", "-.")
MORE_MARKERS = "oDPhd<>p"  # of one policy's families, from the third on
SCORES = plt.colormaps["Blues"].with_extremes(bad="#d0d0d0")  # what is missed stays white; grey: not asked
MOST_PERPLEXITY = 1.15  # beside dense, in the picture against density
WITHIN = 0.01  # a score this far below dense counts as keeping the answers


def draw(summary: dict) -> Iterator[tuple[str, plt.Figure]]:
    if summary["tasks"]:
        yield "score_against_density", score_against_density(summary)
    for asked in ASKED:
        cells = [c for c in summary["tasks"] if c["asked"] == asked]
        if cells:
            yield f"scores_{asked}", scores_by_task(summary, asked)
        if any(c.get("by_depth") for c in cells):
            yield f"needle_depths_{asked}", needle_depths(summary, asked)
    if any(c["perplexity_to_dense"] for c in summary["text"]):
        if all("by_part" in c for c in summary["text"]):
            yield "perplexity", perplexity(summary)
        yield "perplexity_against_density", perplexity_against_density(summary)


def _parsed(name: str) -> settings.Setting:
    return settings.read_back(name)


def _label(name: str) -> tuple[str, str]:
    """Turns share:gamma=0.5,tau=0.4 into share and γ 0.5, τ 0.4."""
    setting = _parsed(name)
    thresholds = dict(setting.thresholds)
    order = [*THRESHOLDS, *(name for name in thresholds if name not in THRESHOLDS)]
    word = lambda name: SYMBOLS.get(name, name.replace("_", " "))  # noqa: E731
    words = [
        word(name) if thresholds[name] is True else f"{word(name)} {thresholds[name]:g}"
        for name in order
        if name in thresholds
    ]
    return POLICIES.get(setting.policy, setting.policy), ", ".join(words)


def _in_legend(name: str) -> str:
    return ", ".join(filter(None, _label(name)))


def _task(name: str) -> str:
    return name.removesuffix("_within").replace("_", " ")


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _in_order(values) -> list:
    return list(dict.fromkeys(values))


def _styles(families: list[str]) -> dict[str, dict]:
    """Gives each policy a colour and marker, and each of its families a line and a fill of the marker."""
    seen: dict[str, int] = defaultdict(int)
    styles = {}
    for family in families:
        policy = _parsed(family).policy
        number = seen[policy]
        seen[policy] += 1
        styles[family] = {
            "color": COLOURS[policy],
            "marker": MARKERS.get(policy, "o") if number < 2 else MORE_MARKERS[number % len(MORE_MARKERS)],
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
    """Draws means over tasks: a row for each place of the question, a column per length."""
    rows = summary["overall"]
    groups, lengths = [a for a in ASKED if any(r["asked"] == a for r in rows)], sorted({r["length"] for r in rows})
    panels = {(r, c): [] for r in range(len(groups)) for c in range(len(lengths))}
    for row in rows:
        panels[groups.index(row["asked"]), lengths.index(row["length"])].append(row)
    named = [ASKED[a] for a in groups]
    return _panels(panels, named, [f"{_length(n)} tokens" for n in lengths], "Right answers, mean over tasks,")


def scores_by_task(summary: dict, asked: str) -> plt.Figure:
    """Draws a row per length and a column per task of one group, with their mean in the last column."""
    cells = [c for c in summary["tasks"] if c["asked"] == asked]
    tasks = _in_order(c["task"] for c in cells)
    if len(tasks) > 1:
        cells += [{**row, "task": "mean"} for row in summary["overall"] if row["asked"] == asked]
        tasks.append("mean")
    lengths = sorted({c["length"] for c in cells})
    panels = {(r, c): [] for r in range(len(lengths)) for c in range(len(tasks))}
    for cell in cells:
        panels[lengths.index(cell["length"]), tasks.index(cell["task"])].append(cell)
    named = [f"{_length(n)} tokens" for n in lengths]
    return _panels(panels, named, [_task(t) for t in tasks], f"Right answers, {ASKED[asked]},")


def _panels(panels: dict[tuple[int, int], list[dict]], rows: list[str], columns: list[str], title: str) -> plt.Figure:
    """Draws score against density, panel by panel. A line joins the settings of one family."""
    cells = [cell for panel in panels.values() for cell in panel]
    styles = _styles(_in_order(_parsed(c["setting"]).family for c in cells))
    figure, axes = _grid(len(rows), len(columns), 2.3, 1.9)
    for (row, column), panel in panels.items():
        families = defaultdict(list)
        for cell in panel:
            families[_parsed(cell["setting"]).family].append(cell)
        for family, curve in families.items():
            _draw_curve(axes[row][column], family, curve, styles[family])
        axes[row][column].grid(color="#dddddd", linewidth=0.6)
    for line, name in zip(axes, rows):
        line[0].set_ylabel(name)
        line[0].yaxis.set_major_formatter(PercentFormatter(1))
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("density")
    sparse = [c["density"] for c in cells if c["setting"] != DENSE]
    axes[0][0].set_xlim(0, 1.06 * max(sparse, default=1))
    axes[0][0].set_ylim(top=1.03)
    axes[0][0].xaxis.set_major_locator(MultipleLocator(0.1))
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{title} against density (computed / causal blocks); bars: 95 %", fontsize=11)
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
    """Chooses dense, the sparsest share that stays within a point of it, and of every other family the setting nearest
    in density.
    """
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


def needle_depths(summary: dict, asked: str) -> plt.Figure:
    """Draws a row per task and a column per setting of about one density: the needle's depth against the prompt's
    length.
    """
    names = compared_settings(summary)
    chosen = [c for c in summary["tasks"] if c["asked"] == asked and c.get("by_depth")]
    cells = {(c["task"], c["setting"], c["length"]): c for c in chosen}
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
        rows = [r["density"] for r in summary["overall"] if (r["setting"], r["asked"]) == (name, asked)]
        policy, thresholds = _label(name)
        own = thresholds + "\n" if thresholds and _parsed(name).policy != "baseline_random" else ""
        axis.set_title(f"{policy}\n{own}density {sum(rows) / len(rows):.2f}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1), shrink=0.6, pad=0.01)
    bar.set_label("right answers", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    until = "its end" if asked == "end" else "the question"
    title = f"Where the needle lies (from the prompt's start to {until}) against length in tokens"
    asked_all = all((task, name, length) in cells for task in tasks for name in names for length in lengths)
    figure.suptitle(title if asked_all else title + "; grey: not asked", fontsize=11)
    return figure


def _right(cell: dict | None, depth: float) -> float:
    for entry in cell["by_depth"] if cell else []:
        if entry["depth"] == depth:
            return entry["right"] / entry["prompts"]
    return float("nan")


def perplexity(summary: dict) -> plt.Figure:
    """Draws a panel per length: perplexity against dense in each part of the text."""
    cells = [c for c in summary["text"] if c["perplexity_to_dense"]]
    names, lengths = _in_order(c["setting"] for c in cells), sorted({c["length"] for c in cells})
    styles = _styles(names)
    figure, axes = _grid(1, len(lengths), 2.8, 2.4)
    for cell in cells:
        axis, place = axes[0][lengths.index(cell["length"])], names.index(cell["setting"])
        ratios = [part["to_dense"] for part in cell["by_part"]]
        bars = [[r["value"] - r["low"] for r in ratios], [r["high"] - r["value"] for r in ratios]]
        apart = 0.7 / len(names) * (place - (len(names) - 1) / 2)  # intervals beside each other, not on top
        axis.errorbar([part + 1 + apart for part in range(len(ratios))], [r["value"] for r in ratios], bars,
                      label=_in_legend(cell["setting"]), markersize=3, elinewidth=0.7,
                      **{**styles[cell["setting"]], "linestyle": ""})  # fmt: skip
    for axis, length in zip(axes[0], lengths):
        axis.axhline(1, color=COLOURS[DENSE], linewidth=1)
        axis.grid(color="#dddddd", linewidth=0.6, axis="y")
        axis.set_title(f"{_length(length)} tokens", fontsize=10)
        axis.set_xlabel(f"part of the text, of {len(cells[0]['by_part'])}")
    axes[0][0].set_ylabel("perplexity / dense")
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def perplexity_against_density(summary: dict) -> plt.Figure:
    """Draws a panel per length: perplexity of whole texts against dense. A line joins the settings of one family."""
    cells = [c for c in summary["text"] if c["perplexity_to_dense"]]
    lengths = sorted({c["length"] for c in cells})
    styles = _styles(_in_order(_parsed(c["setting"]).family for c in cells))
    figure, axes = _grid(1, len(lengths), 3.6, 3.4)
    for axis, length in zip(axes[0], lengths):
        families = defaultdict(list)
        for cell in sorted((c for c in cells if c["length"] == length), key=lambda c: c["density"]):
            families[_parsed(cell["setting"]).family].append(cell)
        for family, curve in families.items():
            ratios = [c["perplexity_to_dense"] for c in curve]
            bars = [[r["value"] - r["low"] for r in ratios], [r["high"] - r["value"] for r in ratios]]
            axis.errorbar([c["density"] for c in curve], [r["value"] for r in ratios], bars, label=_in_legend(family),
                          markersize=4, linewidth=1.3, elinewidth=0.7, **styles[family])  # fmt: skip
        axis.axhline(1, color=COLOURS[DENSE], linewidth=1)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_title(f"{_length(length)} tokens", fontsize=10)
        axis.set_xlabel("density")
    # Random blocks may be many times worse than dense; drawn whole they would leave nothing to see of the others.
    highest = max(c["perplexity_to_dense"]["value"] for c in cells)
    axes[0][0].set_ylim(0.99, min(MOST_PERPLEXITY, highest + 0.01))
    axes[0][0].set_xlim(0, 1.06 * max(c["density"] for c in cells))
    axes[0][0].set_ylabel("perplexity / dense")
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Perplexity of held-out text against density (computed / causal blocks); bars: 95 %", fontsize=11)
    return figure
