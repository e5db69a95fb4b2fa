#!/usr/bin/env python3
"""Are two evaluations the same within their intervals? For one model on two devices, or before and after a change.

    compare.py build/evaluation_cpu build/evaluation_cuda

Folders of evaluate.py are compared prompt by prompt; a summary.json has no prompts, and beside one the
intervals are those of independent samples, which are wider. Exit status: 0 the same, 1 some interval
excludes zero or some density differs by more than --density_tolerance, 2 not comparable. Twenty cells
hold one such interval by chance: look at its size. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import intervals
import journal
import scoring
from intervals import Estimate
from prompts import TEXT
from table import columns

Cell = tuple[int, str, str]  # length, setting, task


@dataclass(frozen=True)
class Row:
    cell: Cell
    prompts: int
    first: float  # share of right answers; of text, nats per token
    second: float
    difference: Estimate  # first minus second
    density: float  # of the first
    density_difference: float
    same_answers: float | None = None  # share of prompts with the same generated text

    def agrees(self, density_tolerance: float) -> bool:
        # Rounding in a summary must not turn an equal result into a difference.
        within = self.difference.low <= 1e-9 and self.difference.high >= -1e-9
        return within and abs(self.density_difference) <= density_tolerance


@dataclass
class Evaluation:
    """The questions of an evaluation and its records by cell and prompt; or, if it is a summary, its cells."""

    path: Path
    subject: dict
    records: dict[Cell, dict[int, dict]] | None = None
    summary: dict[Cell, dict] | None = None

    def cells(self) -> dict:
        return self.records if self.records is not None else self.summary


def load(path: Path) -> Evaluation:
    if path.is_dir():
        records: dict[Cell, dict[int, dict]] = defaultdict(dict)
        for record in journal.read(path / "results.jsonl"):
            records[record["length"], record["setting"], record["task"]][record["index"]] = record
        if not records:
            raise ValueError(f"{path} has no results")
        return Evaluation(path, json.loads((path / "subject.json").read_text()), records=dict(records))
    summary = json.loads(path.read_text())
    cells = {(c["length"], c["setting"], c["task"]): c for c in summary["tasks"]}
    return Evaluation(path, {name: summary.get(name) for name in ("model_fingerprint", "device", "seed")}, summary=cells)


def check_same_questions(first: Evaluation, second: Evaluation) -> None:
    """Raises ValueError unless both asked the same model the same. Text must have the same content, wherever it lies.
    """
    for name in ("model_fingerprint", "seed", "depths", "asked_within", "text_digest"):
        here, there = first.subject.get(name), second.subject.get(name)
        if here is not None and there is not None and here != there:
            raise ValueError(f"{name} {here!r} in {first.path}, but {there!r} in {second.path}")


def compare(first: Evaluation, second: Evaluation) -> list[Row]:
    """Compares the cells that both have, in the order of the first."""
    common = sorted(set(first.cells()) & set(second.cells()), key=list(first.cells()).index)
    if first.records is not None and second.records is not None:
        rows = [_paired(cell, first.records[cell], second.records[cell]) for cell in common]
        return [row for row in rows if row]
    return [_independent(cell, _summed(first, cell), _summed(second, cell)) for cell in common if cell[2] != TEXT]


def _paired(cell: Cell, first: dict[int, dict], second: dict[int, dict]) -> Row | None:
    pairs = [(first[i], second[i]) for i in first if i in second]
    if not pairs:
        return None
    for here, there in pairs:
        if any(here.get(name) != there.get(name) for name in ("depth", "answer", "asked_at", "asked", "bytes")):
            raise ValueError(f"{cell}: prompt {here['index']} is not the same in both")
    sides = list(zip(*pairs))
    if cell[2] == TEXT:
        values = [[scoring.nats_per_token(record) for record in side] for side in sides]
        means = [fmean(side) for side in values]
        difference = intervals.mean([here - there for here, there in zip(*values)])
    else:
        means = [scoring.score(side).value for side in sides]
        difference = scoring.difference(pairs)
    generated = [here["generated"] == there["generated"] for here, there in pairs if "generated" in here]
    density, other = (fmean(record["density"] for record in side) for side in sides)
    same = fmean(generated) if generated else None
    return Row(cell, len(pairs), *means, difference, density, density - other, same)


def _summed(evaluation: Evaluation, cell: Cell) -> dict:
    """Makes a cell as a summary has it."""
    if evaluation.summary is not None:
        return evaluation.summary[cell]
    records = list(evaluation.records[cell].values())
    density = fmean(r["density"] for r in records)
    return {"prompts": len(records), "score": vars(scoring.score(records)), "density": density}


def _independent(cell: Cell, first: dict, second: dict) -> Row:
    """Returns Newcombe's interval, from the two Wilson intervals."""
    a, b = (Estimate(**side["score"]) for side in (first, second))
    value = a.value - b.value
    below, above = math.hypot(a.value - a.low, b.high - b.value), math.hypot(a.high - a.value, b.value - b.low)
    return Row(
        cell,
        min(first["prompts"], second["prompts"]),
        a.value,
        b.value,
        Estimate(value, value - below, value + above),
        first["density"],
        first["density"] - second["density"],
    )


def render(rows: list[Row], density_tolerance: float) -> str:
    header = ["setting, task", "length", "prompts", "first", "second", "difference", "95 % interval", "same answers",
              "density", "difference", ""]  # fmt: skip
    lines = []
    for row in rows:
        length, setting, task = row.cell
        show = (lambda x, sign="": f"{x:{sign}.3f}") if task == TEXT else (lambda x, sign="": f"{100 * x:{sign}.1f}")
        lines.append(
            [
                f"{setting} {task}",
                str(length),
                str(row.prompts),
                show(row.first),
                show(row.second),
                show(row.difference.value, "+"),
                f"{show(row.difference.low, '+')} to {show(row.difference.high, '+')}",
                "" if row.same_answers is None else f"{100 * row.same_answers:.0f} %",
                f"{row.density:.4f}",
                f"{row.density_difference:+.4f}",
                "" if row.agrees(density_tolerance) else "differs",
            ]
        )
    return "\n".join(columns(header, lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="folder of evaluate.py, or a summary.json")
    parser.add_argument("second", type=Path)
    parser.add_argument("--density_tolerance", type=float, default=0.01)
    args = parser.parse_args()
    try:
        first, second = load(args.first), load(args.second)
        check_same_questions(first, second)
        rows = compare(first, second)
        if not rows:
            raise ValueError("no cell is in both")
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print(f"first: {first.path}, {first.subject.get('device')}; second: {second.path}, {second.subject.get('device')}")
    print(render(rows, args.density_tolerance))
    for side, other in ((first, second), (second, first)):
        if left := len(set(side.cells()) - set(other.cells())):
            print(f"{left} cells are in {side.path} alone")
    different = sum(not row.agrees(args.density_tolerance) for row in rows)
    print(f"percent right, of text nats per token; {different} of {len(rows)} cells differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
