"""Turns an answer into a record, and records into the summary. Standard library only."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean, median

import intervals
import settings
from intervals import Estimate
from prompts import TASKS, TEXT, group

DENSE = "dense"
SHARE = "share"
COMPARED_WITH_SHARE = ("vertical_slash", "baseline_query_aware", "baseline_random")
SPARSE_KINDS = ("shared", "scored", "vertical_slash", "baseline")  # of heads, as RecallAudit names them
LARGE_MODEL_HEADS = 1024
TEXT_PARTS = 8  # of a text, alike in length, of which each has its perplexity


def is_right(answer: bytes, generated: bytes) -> bool:
    return generated.startswith(answer)


def _share_right(record: dict) -> float:
    return record["right"] / record.get("asked", 1)


def score(records: list[dict]) -> Estimate:
    """Returns the share of questions answered. The questions of one prompt are not independent, so several count as one
    mean per prompt.
    """
    if all(r.get("asked", 1) == 1 for r in records):
        return intervals.proportion(sum(r["right"] for r in records), len(records))
    return intervals.mean([_share_right(r) for r in records]).clipped(0, 1)


def difference(pairs: list[tuple[dict, dict]]) -> Estimate:
    """Returns the difference of score(), first minus second, on the same prompts."""
    if all(r.get("asked", 1) == 1 for pair in pairs for r in pair):
        return intervals.paired_difference([(bool(a["right"]), bool(b["right"])) for a, b in pairs])
    return intervals.mean([_share_right(a) - _share_right(b) for a, b in pairs]).clipped(-1, 1)


def nats_per_token(record: dict) -> float:
    return sum(record["nats"]) / sum(record["part_tokens"])


def density_in_large_model(density: float, heads: int, pivots: int) -> float:
    """Estimates the density if the same pivots stood among 1024 heads, the others being as dense as they are here.

    Pivots are computed whole and their number grows with the kinds of heads, not with the heads; in a small model they
    are most of what is computed.
    """
    if pivots >= heads or heads >= LARGE_MODEL_HEADS:
        return density
    others = (density * heads - pivots) / (heads - pivots)
    share = pivots / LARGE_MODEL_HEADS
    return share + (1 - share) * others


def summarize(records: list[dict], setting_order: list[str]) -> dict:
    """Computes every figure of the evaluation. README.md of this folder explains the fields."""
    cells: dict[tuple[str, str, int], dict[int, dict]] = defaultdict(dict)
    for record in records:
        cells[record["setting"], record["task"], record["length"]][record["index"]] = record
    rank = {name: i for i, name in enumerate(setting_order)}
    task_rank = {name: i for i, name in enumerate(TASKS)}
    order = sorted(cells, key=lambda c: (c[2], rank.get(c[0], len(rank)), c[0], task_rank[c[1]]))
    tasks = [_task_cell(cells, cell) for cell in order if cell[1] != TEXT]
    overall = _overall(tasks)
    means = [{**row, "task": f"mean, {row['asked']}"} for row in overall if row["tasks"] > 1]
    return {
        "tasks": tasks,
        "overall": overall,
        "text": [_text_cell(cells, cell) for cell in order if cell[1] == TEXT],
        "equal_density": _at_equal_density(tasks + means),
        "recall": _recall(cells, order),
    }


def _cost(records: list[dict]) -> dict:
    def mean_of(field: str, digits: int) -> float:
        return round(fmean(r[field] for r in records), digits)

    def milliseconds(field: str) -> float | None:
        values = [r[field] for r in timed if field in r]
        return round(median(values) / 1000, 2) if values else None

    # Measuring recall takes time, so the times of those records are left out if there are others.
    timed = [r for r in records if "recall" not in r] or records
    large = [density_in_large_model(r["density"], r["heads"], r["pivot_heads"]) for r in records]
    return {
        "density": mean_of("density", 4),
        "density_among_1024_heads": round(fmean(large), 4),
        "pivot_heads": mean_of("pivot_heads", 1),
        "shared_heads": mean_of("shared_heads", 1),
        "scored_heads": round(fmean(r.get("scored_heads", 0) for r in records), 1),
        "vertical_slash_heads": mean_of("vertical_slash_heads", 1),
        "ttft_ms": milliseconds("ttft_us"),
        "compute_ms": milliseconds("compute_us"),
        "attention_ms": milliseconds("attention_us"),
        "pattern_ms": milliseconds("pattern_us"),
    }


def _pairs(cells, cell) -> list[tuple[dict, dict]]:
    """Returns (this setting's, dense's) on the prompts that both have done; none for dense itself."""
    setting, task, length = cell
    here, dense = cells[cell], cells.get((DENSE, task, length), {})
    return [] if setting == DENSE else [(here[i], dense[i]) for i in here if i in dense]


def _task_cell(cells, cell) -> dict:
    setting, task, length = cell
    records = list(cells[cell].values())
    by_depth = defaultdict(list)
    for record in (r for r in records if r["depth"] is not None):
        by_depth[record["depth"]].append(record["right"])
    pairs = _pairs(cells, cell)
    return {
        "length": length,
        "setting": setting,
        "task": task,
        "asked": group(task),
        "prompts": len(records),
        "questions": sum(r.get("asked", 1) for r in records),
        "score": score(records).rounded(),
        "minus_dense": difference(pairs).rounded() if pairs else None,
        "policies_run": sorted({r["policy"] for r in records}),
        "by_depth": [{"depth": d, "prompts": len(r), "right": sum(r)} for d, r in sorted(by_depth.items())],
        **_cost(records),
    }


def _text_cell(cells, cell) -> dict:
    setting, _, length = cell
    records = list(cells[cell].values())
    nats = intervals.mean([nats_per_token(r) for r in records])
    pairs = _pairs(cells, cell)
    bits = sum(sum(r["nats"]) for r in records) / math.log(2)
    return {
        "length": length,
        "setting": setting,
        "prompts": len(records),
        "perplexity": _exponential(nats).rounded(),
        "bits_per_byte": round(bits / sum(r["bytes"] for r in records), 4),
        "perplexity_to_dense": _to_dense([nats_per_token(a) - nats_per_token(b) for a, b in pairs]),
        "by_part": [
            {
                "perplexity": _exponential(intervals.mean([_nats_in(r, part) for r in records])).rounded(),
                "to_dense": _to_dense([_nats_in(a, part) - _nats_in(b, part) for a, b in pairs]),
            }
            for part in range(TEXT_PARTS)
        ],
        **_cost(records),
    }


def _nats_in(record: dict, part: int) -> float:
    return record["nats"][part] / record["part_tokens"][part]


def _to_dense(nats: list[float]) -> dict | None:
    """Returns the ratio of perplexities, from the differences text by text."""
    return _exponential(intervals.mean(nats)).rounded() if nats else None


def _exponential(nats: Estimate) -> Estimate:
    return Estimate(*(_exp(x) for x in (nats.value, nats.low, nats.high)))


def _exp(x: float) -> float:
    return math.exp(min(x, 100.0))  # one prompt alone has an unbounded interval


def _overall(tasks: list[dict]) -> list[dict]:
    """Returns the mean over the tasks of one group, with equal weights, per length and setting."""
    groups = defaultdict(list)
    for cell in tasks:
        groups[cell["length"], cell["setting"], cell["asked"]].append(cell)
    rows = []
    for (length, setting, asked), cells in groups.items():
        scores = [Estimate(**c["score"]) for c in cells]
        differences = [Estimate(**c["minus_dense"]) for c in cells if c["minus_dense"]]
        rows.append(
            {
                "length": length,
                "setting": setting,
                "asked": asked,
                "tasks": len(cells),
                "score": intervals.mean_of(scores).rounded(),
                "minus_dense": intervals.mean_of(differences).rounded() if differences else None,
                "density": round(fmean(c["density"] for c in cells), 4),
                "density_among_1024_heads": round(fmean(c["density_among_1024_heads"] for c in cells), 4),
                "compute_ms": round(fmean(c["compute_ms"] for c in cells), 2),
            }
        )
    return rows


def interpolate(curve: list[tuple[float, float]], x: float) -> tuple[float, bool]:
    """Returns (y at x, whether x lies within the curve). Beyond its ends the nearest point counts."""
    curve = sorted(curve)
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= x <= x1:
            return (y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)), True
    nearest = curve[0] if x < curve[0][0] else curve[-1]
    return nearest[1], x == nearest[0]


def _at_equal_density(tasks: list[dict]) -> list[dict]:
    """Compares each share setting with every other family at the same density, read off the line between its settings.
    """
    curves = defaultdict(list)
    for cell in tasks:
        if _parsed(cell["setting"]).policy in COMPARED_WITH_SHARE:
            family = _parsed(cell["setting"]).family
            curves[cell["task"], cell["length"], family].append((cell["density"], cell["score"]["value"]))
    rows = []
    for cell in (c for c in tasks if _parsed(c["setting"]).policy == SHARE):
        for (task, length, family), curve in curves.items():
            if (task, length) != (cell["task"], cell["length"]):
                continue
            score, within = interpolate(curve, cell["density"])
            rows.append(
                {
                    "length": length,
                    "task": task,
                    "setting": cell["setting"],
                    "density": cell["density"],
                    "score": cell["score"]["value"],
                    "beside": family,
                    "beside_score": round(score, 4),
                    "difference": round(cell["score"]["value"] - score, 4),
                    "within_curve": within,
                }
            )
    return rows


def percentile(values: list[float], share: float) -> float:
    """Returns the smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _recall(cells, order: list[tuple[str, str, int]]) -> list[dict]:
    """Returns recall by length, setting and kind of head, over all heads of all prompts that were measured."""
    heads = defaultdict(list)
    prompts = defaultdict(int)
    for cell in order:
        setting, _, length = cell
        for record in (r for r in cells[cell].values() if "recall" in r):
            for kind, values in record["recall"].items():
                heads[length, setting, kind] += values
                prompts[length, setting, kind] += 1
    return [
        {
            "length": length,
            "setting": setting,
            "kind": kind,
            "prompts": prompts[length, setting, kind],
            "heads": len(values),
            "mean": round(fmean(values), 4),
            "fifth_percentile": round(percentile(values, 0.05), 4),
            "lowest": round(min(values), 4),
        }
        for (length, setting, kind), values in heads.items()
    ]


def _parsed(name: str) -> settings.Setting:
    return settings.parse(name)[0]
