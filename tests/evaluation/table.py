"""Writes the summary as text: a table for a terminal, and JSON with a line per cell for a file."""

from __future__ import annotations

import json

ASKED = {"end": "asked at the end", "within": "asked within"}


def columns(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = lambda row: "  ".join(  # noqa: E731
        cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    return [line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)]


def _points(estimate: dict | None, sign: str = "") -> str:
    """Formats an estimate in percent, with the interval."""
    if estimate is None:
        return ""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.0f}, {high:{sign}.0f}]"


def _overview(summary: dict) -> list[str]:
    """Formats the two means side by side, and perplexity."""
    groups = {(r["length"], r["setting"], r["asked"]): r for r in summary["overall"]}
    text = {(c["length"], c["setting"]): c["perplexity_to_dense"] for c in summary["text"]}
    rows = []
    for length, setting in dict.fromkeys([*((n, s) for n, s, _ in groups), *text]):
        cells = []
        for asked in ASKED:
            row = groups.get((length, setting, asked))
            density = f"{row['density']:.3f}" if row else ""
            cells += [_points(row["score"]), _points(row["minus_dense"], "+"), density] if row else [""] * 3
        ratio = text.get((length, setting))
        rows.append([setting, str(length), *cells, _ratio(ratio)])
    grouped = [title for asked in ASKED.values() for title in (asked, "- dense", "density")]
    header = ["mean over tasks", "length", *grouped, "perplexity / dense"]
    return columns(header, rows) + ["percent right [95 % interval]", ""]


def _ratio(estimate: dict | None) -> str:
    if not estimate:
        return ""
    # The interval of two or three texts may be too wide to mean anything.
    interval = "[{low:.4f}, {high:.4f}]".format(**estimate) if estimate["high"] < 100 else "[?]"
    return f"{estimate['value']:.4f} {interval}"


def _scores(summary: dict, length: int, asked: str) -> list[str]:
    chosen = [c for c in summary["tasks"] if c["asked"] == asked]
    cells = {(c["setting"], c["task"]): c for c in chosen if c["length"] == length}
    names = list(dict.fromkeys(c["task"] for c in chosen))
    rows = []
    for row in (r for r in summary["overall"] if (r["length"], r["asked"]) == (length, asked)):
        own = [cells.get((row["setting"], name)) for name in names]
        rows.append(
            [
                row["setting"],
                *(_points(c["score"]) if c else "" for c in own),
                _points(row["score"]),
                _points(row["minus_dense"], "+"),
                f"{row['density']:.3f}",
                f"{row['density_among_1024_heads']:.3f}",
                f"{sum(c['pivot_heads'] for c in own if c) / row['tasks']:.1f}",
                f"{sum(c['shared_heads'] for c in own if c) / row['tasks']:.1f}",
                f"{row['compute_ms']:.1f}",
            ]
        )
    if not rows:
        return []
    prompts = max(c["prompts"] for c in cells.values())
    title = f"{length} tokens, {ASKED[asked]}"
    columns_of_tasks = [name.removesuffix("_within") for name in names]
    header = [title, *columns_of_tasks, "mean", "- dense", "density", "of 1024", "pivots", "shared", "compute ms"]
    other = [
        f"{c['setting']} {c['task']}: the server ran {', '.join(c['policies_run'])}"
        for c in cells.values()
        if c["policies_run"] != [c["setting"].partition(":")[0]]
    ]
    return columns(header, rows) + [*other, f"percent right [95 % interval]; up to {prompts} prompts a cell", ""]


def _text(summary: dict) -> list[str]:
    """Formats whole texts, and the ratio in each part of them."""
    parts = max(len(c["by_part"]) for c in summary["text"])
    rows = [
        [
            c["setting"],
            str(c["length"]),
            str(c["prompts"]),
            f"{c['perplexity']['value']:.3f}",
            f"{c['bits_per_byte']:.4f}",
            _ratio(c["perplexity_to_dense"]),
            *(f"{part['to_dense']['value']:.4f}" if part["to_dense"] else "" for part in c["by_part"]),
            f"{c['density']:.3f}",
        ]
        for c in summary["text"]
    ]
    numbers = [f"{part}/{parts}" for part in range(1, parts + 1)]
    header = ["held-out text", "length", "texts", "perplexity", "bits per byte", "/ dense", *numbers, "density"]
    return columns(header, rows) + [f"{numbers[0]} is the first part of a text: perplexity there / that of dense", ""]


def _equal_density(summary: dict) -> list[str]:
    rows = [
        [
            f"{r['setting']} {r['task']}",
            str(r["length"]),
            f"{r['density']:.3f}",
            f"{100 * r['score']:.1f}",
            r["beside"],
            f"{100 * r['beside_score']:.1f}",
            f"{100 * r['difference']:+.1f}",
        ]
        for r in summary["equal_density"]
        if r["within_curve"]
    ]
    header = ["at equal density", "length", "density", "score", "beside", "its score", "difference"]
    return columns(header, rows) + [""]


def _recall(summary: dict) -> list[str]:
    rows = [
        [
            r["setting"],
            str(r["length"]),
            r["kind"],
            str(r["prompts"]),
            str(r["heads"]),
            *(f"{r[name]:.3f}" for name in ("mean", "fifth_percentile", "lowest")),
        ]
        for r in summary["recall"]
    ]
    header = ["recall", "length", "heads", "prompts", "measured", "mean", "5th percentile", "lowest"]
    return columns(header, rows) + [""]


def render(summary: dict) -> str:
    lines = _overview(summary)
    for length in sorted({r["length"] for r in summary["overall"]}):
        for asked in ASKED:
            lines += _scores(summary, length, asked)
    if summary["text"]:
        lines += _text(summary)
    if any(r["within_curve"] for r in summary["equal_density"]):
        lines += _equal_density(summary)
    if summary["recall"]:
        lines += _recall(summary)
    return "\n".join(lines)


def as_json(summary: dict) -> str:
    parts = []
    for name, value in summary.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(cell)}" for cell in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
