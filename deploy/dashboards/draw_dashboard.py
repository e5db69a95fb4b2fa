#!/usr/bin/env python3
"""Draws the dashboard from the queries in prefilld.json, where there is a Prometheus and no Grafana. Needs matplotlib.

    deploy/dashboards/draw_dashboard.py --prometheus=http://localhost:9090 --minutes=60 --out=dashboard.png
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402
from PIL import Image  # noqa: E402  matplotlib needs it too

DASHBOARD = Path(__file__).resolve().parent / "prefilld.json"
POINTS = 120
COLORS = ("#3274d9", "#e0752d", "#299c46", "#a352cc", "#c4162a", "#8f8f1f", "#0a7c8c", "#8c564b")
INK, FAINT, PAGE = "#24292e", "#8a9099", "#f4f5f7"


def metric_prefix(value: float, names: tuple[str, ...], base: float) -> str:
    power = 0
    while abs(value) >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g} {names[power]}".rstrip()


def seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    for least, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if abs(value) >= least:
            return f"{value / least:.3g} {name}"
    return f"{value / 1e-6:.3g} µs"


def formatted(value: float, unit: str) -> str:
    """Writes a value in one of Grafana's units."""
    if unit == "s":
        return seconds(value)
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return metric_prefix(value, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)
    if unit == "Bps":
        return metric_prefix(value, ("B/s", "kB/s", "MB/s", "GB/s"), 1000)
    if unit in ("reqps", "cps"):
        return f"{value:.3g}/s"
    return metric_prefix(value, ("", "k", "M", "G"), 1000)


class Source:
    """A Prometheus, and the time that is drawn."""

    def __init__(self, url: str, end: float, span: float, window: str):
        self._url, self.end, self.start = url, end, end - span
        self._step, self._window = span / POINTS, window

    def series(self, panel: dict) -> list[tuple[str, list[float], list[float]]]:
        """Returns the legend, the minutes since the start and the values of each series of a panel."""
        found = []
        for target in panel["targets"]:
            expr = target["expr"].replace("$__rate_interval", self._window).replace("$instance", ".*")
            parameters = {"query": expr, "start": self.start, "end": self.end, "step": self._step}
            with urllib.request.urlopen(f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}") as page:
                results = json.load(page)["data"]["result"]
            for result in results:
                labels = result["metric"]
                legend = re.sub(r"\{\{(\w+)\}\}", lambda m, labels=labels: labels.get(m[1], ""), target["legendFormat"])
                minutes = [(at - self.start) / 60 for at, _ in result["values"]]
                values = [float(value) for _, value in result["values"]]
                if not all(map(math.isnan, values)):
                    found.append((legend, minutes, values))
        return sorted(found, key=lambda one: length_order(one[0]))


def length_order(legend: str) -> tuple:
    """Sorts classes of lengths by length."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", legend))


def style(axes, title: str, size: float) -> None:
    axes.set_facecolor("white")
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK, pad=5)
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_number(axes, panel: dict, source: Source) -> None:
    style(axes, panel["title"], 9)
    axes.set_xticks([])
    axes.set_yticks([])
    series = source.series(panel)
    last = next((v for v in reversed(series[0][2]) if not math.isnan(v)), None) if series else None
    text = "no data" if last is None else formatted(last, panel["fieldConfig"]["defaults"]["unit"])
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=17, color=COLORS[0], transform=axes.transAxes)


def draw_lines(axes, panel: dict, source: Source) -> None:
    style(axes, panel["title"], 10)
    defaults = panel["fieldConfig"]["defaults"]
    series = source.series(panel)
    axes.grid(True, color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    if defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal" and series:
        minutes = max((one[1] for one in series), key=len)
        by_time = [dict(zip(one[1], one[2])) for one in series]
        rows = [[0.0 if math.isnan(v := one.get(m, 0.0)) else v for m in minutes] for one in by_time]
        axes.stackplot(minutes, rows, labels=[one[0] for one in series], colors=COLORS, alpha=0.75, linewidth=0)
    else:
        for i, (legend, minutes, values) in enumerate(series):
            color, dashes = COLORS[i % len(COLORS)], "-" if i < len(COLORS) else "--"
            axes.plot(minutes, values, dashes, color=color, linewidth=1.4, label=legend)
    bottom, top = axes.get_ylim()
    axes.set_ylim(0, defaults.get("max", top if top > 0 else 1) * (1.03 if "max" in defaults else 1))
    axes.set_xlim(0, (source.end - source.start) / 60)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, defaults["unit"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} min"))
    if not series:
        axes.text(0.5, 0.5, "no data", ha="center", color=FAINT, transform=axes.transAxes)
        return
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4 if len(series) > 3 else 3, fontsize=7.5,
                frameon=False, handlelength=1.2, columnspacing=1.0, labelcolor=INK)  # fmt: skip


def draw(dashboard: dict, source: Source, out: Path) -> None:
    """Draws the panels where Grafana shows them."""
    unit = 0.335  # inches for a unit of Grafana's grid
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = plt.figure(figsize=(15, height * unit), facecolor=PAGE)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, width = place["x"] / 24, place["w"] / 24
        top, tall = 1 - place["y"] / height, place["h"] / height
        if panel["type"] == "row":
            figure.text(0.012, top - 0.72 * tall, panel["title"], fontsize=12, fontweight="bold", color=FAINT)
            continue
        is_number = panel["type"] == "stat"
        edges = (0.012, 0.012, 0.1, 0.28) if is_number else (0.048, 0.014, 0.26, 0.11)  # left, right, below, above
        box = (left + edges[0], top - tall * (1 - edges[2]), width - edges[0] - edges[1], tall * (1 - edges[2] - edges[3]))
        axes = figure.add_axes(box)
        (draw_number if is_number else draw_lines)(axes, panel, source)
    figure.savefig(out, dpi=96, facecolor=PAGE)
    plt.close(figure)
    Image.open(out).convert("RGB").quantize(64).save(out, optimize=True)  # a fourth of the size


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--prometheus", default="http://localhost:9090", help="its address")
    arguments.add_argument("--minutes", type=float, default=60, help="time that is drawn, up to now")
    arguments.add_argument("--window", default="1m", help="over which rates are taken: four scrapes at least")
    arguments.add_argument("--out", type=Path, default=Path("dashboard.png"))
    args = arguments.parse_args()
    source = Source(args.prometheus.rstrip("/"), time.time(), 60 * args.minutes, args.window)
    draw(json.loads(DASHBOARD.read_text()), source, args.out)


if __name__ == "__main__":
    main()
