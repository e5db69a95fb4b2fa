#!/usr/bin/env python3
"""Groups the heads whose attention looks alike, says which groups gain from sharing and at which thresholds, and writes
head_clusters.json, from what prefill-calibrate recorded.

    cluster_heads.py DUMPS --out head_clusters.json
    cluster_heads.py DUMPS --clusters published.json --out head_clusters.json     keep these groups, tune the rest

README.md in this folder says how it decides and how to read what it prints. Needs NumPy, SciPy and safetensors.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import benefit
import cluster_file
import dumps as recorded
import grouping
import report
import tuning
from cluster_file import ClusterFile
from dumps import Dump
from simulation import Group, Thresholds

CUTS = [round(0.9 - 0.05 * i, 2) for i in range(17)]  # of the largest distance at which two groups were joined
PAPER = Thresholds(gamma=0.9, tau=0.2, delta=0.3)


@dataclass
class Parts:
    """The prompts, split by what they are for. Each domain deals out its own in turn, the shorter ones first."""

    forming: list[Dump]  # the groups
    choosing: list[Dump]  # what shares, and the thresholds
    judging: list[Dump]  # the figures that are reported

    @staticmethod
    def of(dumps: list[Dump]) -> Parts:
        parts = Parts([], [], [])
        for domain, count in Counter(d.domain for d in dumps).items():
            prompts = sorted((d for d in dumps if d.domain == domain), key=lambda d: d.num_tokens)
            if count < 2:
                raise ValueError(f"domain {domain!r} has one prompt; two are needed, three are better")
            parts.forming += prompts[::3] if count > 2 else prompts[:1]
            parts.choosing += prompts[1::3] if count > 2 else prompts[1:]
            parts.judging += prompts[2::3]
        return parts if parts.judging else replace(parts, judging=parts.choosing)


def form_groups(
    args: argparse.Namespace, parts: Parts, features: dict[Dump, np.ndarray]
) -> tuple[list[Group], float, int]:
    """Cuts as coarsely as possible, for the fewest pivots, while the first head's pattern still holds what is asked
    for. Returns the groups, where the tree was cut, and into how many parts, single heads included.
    """
    tree = grouping.tree_of([features[dump] for dump in parts.forming])
    for cut in [args.cut] if args.cut else CUTS:
        report.progress(f"cut at {cut:.2f} of the largest distance")
        labels = grouping.cut_at(tree, cut)
        groups = grouping.groups_of(labels, args.smallest)
        if benefit.patterns_hold(parts.forming, groups, args.recall):
            break
    return groups, cut, len(np.unique(labels))


def apart(named: dict[str, Group], shared: list[Group], smallest: int) -> dict[str, Group]:
    """Returns the parts that share, and what is left of the groups that they were found in."""
    taken = {head for part in shared for head in part}
    rest = (tuple(head for head in group if head not in taken) for group in named.values())
    groups = [*shared, *(group for group in rest if len(group) >= smallest)]
    return {str(number): group for number, group in enumerate(groups)}


def given_groups(file: ClusterFile, num_heads: int) -> dict[str, Group]:
    number = lambda heads: tuple(sorted(layer * num_heads + head for layer, head in heads))  # noqa: E731
    return {name: number(heads) for name, heads in file.clusters.items()}


def rows_to_compare(
    goal: tuning.Goal, parts: Parts, groups: list[Group], chosen: tuning.Choice, given: ClusterFile | None
) -> list[report.Row]:
    """Returns the choice and its alternatives, all judged on prompts that had no part in it."""
    judged = lambda name, shared, t: report.Row(name, t, tuning.judge(parts.judging, shared, t))  # noqa: E731
    alone = tuning.vertical_slash_alone(parts.choosing, goal)
    rows = [
        judged("written", chosen.shared, chosen.thresholds),
        judged("vertical-slash alone", [], alone.thresholds),
        judged("every group shared", groups, replace(chosen.thresholds, tau=1.0, delta=1.0, coverage=1.0)),
        judged("thresholds of the paper", groups, PAPER),
    ]
    if given:
        named = given_groups(given, parts.judging[0].num_heads)
        known = {name: value for name, value in (given.thresholds or {}).items() if value is not None}
        rows.append(judged("the given file as it is", [named[n] for n in given.shared], Thresholds(**known)))
    return rows


def provenance(
    args: argparse.Namespace, dumps: list[Dump], cut: float | None, chosen: tuning.Choice, rows: list[report.Row],
    agreement: dict[str, float], overlap: dict[str, tuple[float, float]],
) -> dict:  # fmt: skip
    """Describes how the file came about and what was measured. It is for people; no program reads it."""
    return {
        "prompts": dict(sorted(Counter(d.domain for d in dumps).items())),
        "tokens": sorted({d.num_tokens for d in dumps}),
        "block_tokens": dumps[0].block_tokens,
        "map_block_tokens": sorted({d.block for d in dumps}),
        "groups": args.clusters.name if args.clusters else "average linkage of principal components of log block mass",
        "cut": cut,
        "recall": args.recall,
        "low_recall": args.low_recall,
        "recall_reached": chosen.reached,
        "pivot_cost": args.pivot_cost,
        "adjusted_rand_index": report.rounded(agreement),
        "pattern_overlap": {
            domain: report.rounded({"within": within, "between": between})
            for domain, (within, between) in overlap.items()
        },
        "measured": {row.name: report.rounded(asdict(row.summary)) for row in rows},
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="+", type=Path, help="files of prefill-calibrate, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="the cluster file")
    parser.add_argument("--recall", type=float, default=0.9, help="attention mass that sparse heads are to keep, mean")
    parser.add_argument("--low_recall", type=float, help="the same at the 5th percentile; 0.1 less when absent")
    parser.add_argument("--coverage", type=float, default=0.85, help="below this, vertical-slash has failed a head")
    parser.add_argument("--pivot_cost", type=float, default=1.0,
                        help="density that an exact head counts for; below 1: what would share in a model with more "
                        "heads to a group")  # fmt: skip
    parser.add_argument("--cut", type=float, help="share of the largest distance; chosen when absent")
    parser.add_argument("--smallest", type=int, default=2, help="heads; smaller groups are noise")
    parser.add_argument("--clusters", type=Path, help="take the groups from this file")
    parser.add_argument("--plain", action="store_true", help="write clusters and shared_clusters alone")
    args = parser.parse_args()
    if not 0 < args.recall < 1:
        parser.error(f"--recall {args.recall} is outside (0, 1)")
    if args.low_recall is None:
        args.low_recall = max(0.0, round(args.recall - 0.1, 4))
    if not 0 <= args.low_recall <= args.recall:
        parser.error(f"--low_recall {args.low_recall} is outside [0, --recall {args.recall}]")
    if args.smallest < 2:
        parser.error(f"--smallest {args.smallest} is below 2, and a head alone has nothing to share with")
    for name in ("coverage", "pivot_cost", "cut"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            parser.error(f"--{name} {value} is outside (0, 1]")
    return args


def main() -> None:
    args = read_arguments()
    dumps = recorded.load(args.dumps, report.progress)
    model, parts = dumps[0], Parts.of(dumps)
    grid = min(grouping.GRID, max(dump.n for dump in dumps))
    features = {dump: grouping.pooled_log_mass(dump, grid) for dump in dumps}
    domains = sorted({dump.domain for dump in dumps})
    by_domain = {domain: [features[d] for d in dumps if d.domain == domain] for domain in domains}

    given, cut, num_parts = None, None, 0
    if args.clusters:
        given = cluster_file.read(args.clusters, model.num_layers, model.num_heads)
        named = given_groups(given, model.num_heads)
    else:
        formed, cut, num_parts = form_groups(args, parts, features)
        named = {str(number): group for number, group in enumerate(formed)}

    goal = tuning.Goal(args.recall, args.low_recall, args.coverage, args.pivot_cost)
    tuning_done = lambda done: report.progress(f"tuning {done:.0%}")  # noqa: E731
    chosen = tuning.tune(parts.choosing, list(named.values()), goal, whole=bool(given), progress=tuning_done)
    if not given:
        named = apart(named, chosen.shared, args.smallest)
    groups = list(named.values())
    prices = tuning.prices_at(parts.choosing, chosen, goal)
    benefits = {
        name: benefit.benefit(parts.choosing, group, chosen.thresholds, prices) for name, group in named.items()
    }
    report.show_groups(model, named, benefits, chosen)

    agreement = grouping.stability(by_domain, num_parts) if len(domains) > 1 and not given else {}
    gamma = chosen.thresholds.gamma
    judging = {domain: [d for d in parts.judging if d.domain == domain] for domain in domains}
    overlap = {domain: grouping.pattern_overlap(judging[domain], chosen.shared, groups, gamma) for domain in domains}
    report.show_stability(agreement, overlap)

    rows = rows_to_compare(goal, parts, groups, chosen, given)
    held_out = parts.judging is not parts.choosing
    report.show_rows(rows, tuning.oracle_density(parts.judging, args.recall), args.recall, len(parts.judging), held_out)
    report.show_verdict(chosen, args.recall)

    pairs = {name: [divmod(head, model.num_heads) for head in group] for name, group in named.items()}
    file = ClusterFile(pairs, [name for name, group in named.items() if group in chosen.shared])
    if args.plain:
        cluster_file.write(args.out, file)
        return
    thresholds = {name: value for name, value in asdict(chosen.thresholds).items() if value is not None}
    file.thresholds, file.fingerprint = report.rounded(thresholds), model.fingerprint
    calibration = provenance(args, dumps, cut, chosen, rows, agreement, overlap)
    cluster_file.write(args.out, file, calibration, {name: report.rounded(asdict(b)) for name, b in benefits.items()})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"cluster_heads.py: {error}")
