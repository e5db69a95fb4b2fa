"""Turns the records of measure.py and judge_rules.py into figures: perplexity against dense, text by text. Standard
library only.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median, stdev

import intervals
from intervals import Estimate

DENSE = "dense"
TASK = "text"


def nats(record: dict) -> float:
    """Returns the mean over all tokens of a text."""
    return (record["nats_repeated"] + record["nats_other"]) / (record["tokens_repeated"] + record["tokens_other"])


def summarize(records: list[dict], setting_order: list[str]) -> dict:
    """Computes a cell per length and setting; the README of this folder explains the fields."""
    texts: dict[tuple[int, str], dict[int, dict]] = defaultdict(dict)
    for record in records:
        texts[record["length"], record["setting"]][record["index"]] = record
    order = sorted(texts, key=lambda cell: (cell[0], setting_order.index(cell[1])))
    return {"tasks": [], "overall": [], "text": [_cell(texts, *cell) for cell in order]}


def _cell(texts: dict, length: int, setting: str) -> dict:
    here = list(texts[length, setting].values())
    dense = {} if setting == DENSE else texts.get((length, DENSE), {})
    pairs = [(record, dense[record["index"]]) for record in here if record["index"] in dense]
    cell = {
        "length": length,
        "setting": setting,
        "texts": len(here),
        "perplexity": _ratio([nats(r) for r in here]).rounded(),
        "density": round(fmean(r["density"] for r in here), 4),
        "compute_ms": round(median(r["compute_us"] for r in here) / 1000, 2),
        "perplexity_to_dense": None,
    }
    return {**cell, **_beside_dense(pairs)} if pairs else cell


def _beside_dense(pairs: list[tuple[dict, dict]]) -> dict:
    lost = [nats(a) - nats(b) for a, b in pairs]
    worst = max(range(len(pairs)), key=lost.__getitem__)
    kinds = defaultdict(list)
    for difference, (record, _) in zip(lost, pairs):
        kinds[record["kind"]].append((difference, record["density"]))
    return {
        "compared_texts": len(pairs),
        "perplexity_to_dense": _ratio(lost).rounded(),
        # The spread of a logarithm is the relative spread.
        "standard_error": round(stdev(lost) / math.sqrt(len(lost)), 5) if len(lost) > 1 else None,
        "worst_text": {
            "perplexity_to_dense": round(math.exp(lost[worst]), 4),
            "index": pairs[worst][0]["index"],
            "kind": pairs[worst][0]["kind"],
        },
        "by_kind": {
            kind: {
                "texts": len(values),
                "perplexity_to_dense": round(math.exp(fmean(d for d, _ in values)), 4),
                "density": round(fmean(density for _, density in values), 4),
            }
            for kind, values in sorted(kinds.items())
        },
        "lost_by_repeated": lost_by(pairs, "repeated"),
        "lost_by_other": lost_by(pairs, "other"),
        "same_next_token": round(fmean(a["next_token"] == b["next_token"] for a, b in pairs), 4),
    }


def lost_by(pairs: list[tuple[dict, dict]], which: str) -> dict | None:
    """Returns the mean over all tokens of one sort, of all texts together, of the nats lost against dense.

    The standard error is that of a ratio of sums whose texts are independent; None for one text.
    """
    tokens = [a[f"tokens_{which}"] for a, _ in pairs]
    lost = [a[f"nats_{which}"] - b[f"nats_{which}"] for a, b in pairs]
    total, count = sum(tokens), len(pairs)
    if total == 0:
        return None
    mean = sum(lost) / total
    apart = sum((d - mean * n) ** 2 for d, n in zip(lost, tokens))
    error = math.sqrt(apart * count / (count - 1)) / total if count > 1 else None
    return {"tokens": total, "nats": round(mean, 5), "standard_error": error and round(error, 5)}


def _ratio(values: list[float]) -> Estimate:
    """Returns exp of the mean, with Student's interval; a single text has no interval but all numbers."""
    made = intervals.mean(values)
    return Estimate(*(math.exp(min(x, 100.0)) for x in (made.value, made.low, made.high)))


def table(summary: dict) -> str:
    """Formats the figures for a terminal."""
    lines = [f"{'tokens':>6} {'setting':40} {'texts':>5} {'/ dense':>8} {'s.e.':>7} {'worst':>7} {'density':>7} "
             f"{'lost: repeated':>14} {'other':>8} {'ms':>9}"]  # fmt: skip
    for cell in summary["text"]:
        line = f"{cell['length']:6} {cell['setting']:40} {cell['texts']:5} "
        if cell["perplexity_to_dense"]:
            repeated = cell["lost_by_repeated"]
            line += f"{cell['perplexity_to_dense']['value']:8.4f} {cell['standard_error'] or math.nan:7.4f} "
            line += f"{cell['worst_text']['perplexity_to_dense']:7.4f} {cell['density']:7.3f} "
            line += f"{repeated['nats'] if repeated else math.nan:14.4f} {cell['lost_by_other']['nats']:8.4f} "
        else:
            line += f"{'':8} {'':7} {'':7} {cell['density']:7.3f} {'':14} {'':8} "
        lines.append(line + f"{cell['compute_ms']:9.1f}")
    return "\n".join(lines) + "\n"


def write_summary(folder: Path, subject: dict, records: list[dict], setting_order: list[str]) -> dict:
    """Writes summary.json and table.txt of the settings named, and returns the former."""
    known = set(setting_order)
    summary = {**subject, **summarize([r for r in records if r["setting"] in known], setting_order)}
    rest = json.dumps({name: value for name, value in summary.items() if name != "text"}, indent=1)
    cells = ",\n".join(f"  {json.dumps(cell)}" for cell in summary["text"])
    (folder / "summary.json").write_text(f'{rest[:-2]},\n "text": [\n{cells}\n ]\n}}\n')
    read_back = json.loads((folder / "summary.json").read_text())
    (folder / "table.txt").write_text(table(read_back))
    return read_back
