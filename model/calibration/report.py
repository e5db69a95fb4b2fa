"""Prints the report of cluster_heads.py."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from benefit import Benefit
from dumps import Dump
from simulation import Group, Summary, Thresholds
from tuning import Choice


@dataclass(frozen=True)
class Row:
    """A way to serve, with its results."""

    name: str
    thresholds: Thresholds
    summary: Summary


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def rounded(values: dict) -> dict:
    """Rounds numbers to four digits, and turns NaN, which JSON does not have, into null."""

    def fit(value):
        if not isinstance(value, float):
            return value
        return None if math.isnan(value) else round(value, 4)

    return {name: fit(value) for name, value in values.items()}


def figure(value: float | None) -> str:
    return "    –" if value is None or math.isnan(value) else f"{value:5.3f}"


def show_groups(model: Dump, groups: dict[str, Group], benefits: dict[str, Benefit], chosen: Choice) -> None:
    progress("")
    grouped = sum(map(len, groups.values()))
    print(f"{len(groups)} groups hold {grouped} of {len(model.mass)} heads; {len(chosen.shared)} share\n")
    print("               if it shares           vertical-slash     saves    vertical-slash at the members' cost")
    print("group  heads   recall  density      recall  density              recall   worst head             heads")
    for name, group in groups.items():
        b = benefits[name]
        heads = " ".join(f"{h // model.num_heads}.{h % model.num_heads}" for h in group[:6])
        print(
            f"{name:>5}  {b.heads:5}    {figure(b.recall)}    {figure(b.density)}"
            f"       {figure(b.vertical_slash_recall)}    {figure(b.vertical_slash_density)}    {b.saved:6.3f}"
            f"       {figure(b.vertical_slash_recall_at_member_density)}"
            f"        {figure(b.vertical_slash_recall_at_member_density_worst)}"
            f"      {'shares' if group in chosen.shared else '      '}   {heads}{' …' if len(group) > 6 else ''}"
        )


def show_stability(agreement: dict[str, float], overlap: dict[str, tuple[float, float]]) -> None:
    if agreement:
        print("\nadjusted Rand index of the groups by one domain alone and by another (a/a: by two halves of it)")
        for pair, index in sorted(agreement.items()):
            print(f"  {pair:<30} {figure(index)}")
    print("\noverlap of patterns (Jaccard)      within groups that share   between groups")
    for domain, (within, between) in overlap.items():
        print(f"  {domain:<30}   {figure(within)}                      {figure(between)}")


def show_rows(rows: list[Row], oracle: float, recall: float, prompts: int, held_out: bool) -> None:
    which = "that had no part in the choice" if held_out else "that the choice was made on"
    print(f"\nserved, by simulation on {prompts} prompts {which}; recall asked for: {recall}")
    print(f"{'of':>75}      all sparse      shared heads      heads")
    print(f"{'v-s':>44}")
    print(f"{'gamma gamma   tau  delta floor  density 1024':>77}    recall   5 %    recall   5 %      pivot shared v-s")
    for row in rows:
        s, t = row.summary, row.thresholds
        print(
            f"  {row.name:<30} {t.gamma:5.3f} {t.vertical_slash_gamma or t.gamma:5.3f} {t.tau:5.2f} {t.delta:6.2f} {t.min_budget_tokens:5}"
            f"    {s.density:5.3f} {s.density_among_1024:5.3f}    {s.recall:5.3f} {figure(s.low_recall)}"
            f"     {figure(s.shared_recall)} {figure(s.low_shared_recall)}"
            f"     {s.pivots:5.1f} {s.shared:6.1f} {s.vertical_slash:4.0f}"
        )
    print(f"  {'best blocks of every head':<30} {recall:5.3f}                             {oracle:5.3f}")


def show_verdict(chosen: Choice, recall: float) -> None:
    if not chosen.reached:
        print(f"\nno thresholds reach a recall of {recall}; those with the highest are written")
    if not chosen.shared:
        print("\nno group shares: on these prompts vertical-slash alone holds as much for fewer blocks")
