#!/usr/bin/env python3
"""Groups the heads whose attention looks alike, and says which groups gain from sharing: head_clusters.json.

    cluster_heads.py --model FOLDER --text DOCS SOURCES --out head_clusters.json

Calibration prompts (retrieval, prose and code) run densely. The block mass of every head is pooled to one 64 x 64 map
per prompt, and heads are joined by the distance of the logarithms of their maps. A group is shared when the pattern of
its first head serves its members better than a vertical-slash set of as many blocks, which fails one of them; that is
judged on other prompts than those which formed the groups.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage

import corpus
import tasks
from decoder import Decoder
from reference_policies import (
    Estimate,
    dense_with_mass,
    density,
    estimate,
    mass_inside,
    pivot_pattern,
    shared_pattern,
    vertical_slash,
    vertical_slash_of_cost,
)

GRID = 64
CUT = 0.4  # of the largest distance at which two groups were joined
FLOOR = 1e-5  # of mass, before the logarithm


def calibration_prompts(text: corpus.Corpus, length: int, seed: int) -> list[tuple[str, list[int]]]:
    """Eight prompts of exactly `length` ids: (domain, ids)."""
    rng = random.Random(seed)
    made = [
        ("retrieval", tasks.make("pass_key", rng, length, text.filler).prompt),
        ("retrieval", tasks.make("pass_key", rng, length).prompt),
        ("retrieval", tasks.make("key_value", rng, length).prompt),
        ("retrieval", tasks.make("key_value", rng, length).prompt),
        ("retrieval", tasks.make("multi_needle", rng, length, text.filler).prompt),
        ("retrieval", tasks.make("number_string", rng, length).prompt),
    ]
    # The first source is prose and the last is code, by the order they are given in.
    for domain, blob in (("text", text.blobs[0]), ("code", text.blobs[-1])):
        start = rng.randrange(max(1, len(blob) - length))
        made.append((domain, blob[start : start + length - 1].replace(bytes([corpus.END_OF_FILE]), b"\n")))
    return [(domain, tasks.encode(prompt)) for domain, prompt in made]


class Observer:
    """Dense attention that keeps what it saw, layer by layer."""

    def __init__(self, block: int):
        self.block = block
        self.mass: list[torch.Tensor] = []  # [H,n,n]
        self.estimates: list[Estimate] = []

    def __call__(self, layer: int, q, k, v):
        group = q.shape[1] // k.shape[1]
        q, k, v = q[0], k[0].repeat_interleave(group, 0), v[0].repeat_interleave(group, 0)
        out, mass = dense_with_mass(q, k, v, self.block)
        self.mass.append(mass)
        self.estimates.append(estimate(q, k, self.block))
        return out[None]

    def of(self, heads: list[tuple[int, int]]) -> tuple[torch.Tensor, Estimate]:
        """Block mass and estimate of some heads, stacked."""
        parts = [self.estimates[layer] for layer, _ in heads]
        fields = ([getattr(p, name)[h] for p, (_, h) in zip(parts, heads)] for name in ("blocks", "vertical", "slash"))
        return torch.stack([self.mass[layer][h] for layer, h in heads]), Estimate(*map(torch.stack, fields))


@torch.no_grad()
def observe(model: Decoder, ids: list[int], block: int) -> Observer:
    observer = Observer(block)
    model(torch.tensor([ids], device=model.embedding.device), observer)
    return observer


def pooled_log_mass(mass: torch.Tensor) -> np.ndarray:
    """[H,n,n] -> [H, GRID*GRID]: rows averaged, columns summed, so a row keeps the sum 1."""
    n = mass.shape[-1]
    if n % GRID:
        raise ValueError(f"{n} blocks do not pool to {GRID}; take a length that is a multiple of {GRID} blocks")
    pooled = F.avg_pool2d(mass[:, None], n // GRID)[:, 0] * (n // GRID)
    return torch.log(pooled + FLOOR).flatten(1).cpu().numpy()


def group(features: np.ndarray) -> np.ndarray:
    """features [heads, values] -> labels from 1."""
    tree = linkage(features, method="average")
    return fcluster(tree, CUT * tree[:, 2].max(), criterion="distance")


def adjusted_rand_index(a: np.ndarray, b: np.ndarray) -> float:
    pairs = lambda counts: float((counts * (counts - 1) / 2).sum())  # noqa: E731
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / pairs(np.array([len(a)]))
    most = (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def benefit(members: list[tuple[int, int]], held_out: list[Observer], gamma: float) -> dict:
    """Recall and density of the members: vertical-slash, the pattern of the first member, vertical-slash of its cost."""
    rows = []
    for seen in held_out:
        mass, estimates = seen.of(members)
        shared = shared_pattern(pivot_pattern(mass[:1], gamma), estimates, gamma)
        free = vertical_slash(estimates, gamma, seen.block)
        rival = vertical_slash_of_cost(estimates, shared.sum((1, 2)), seen.block)
        rows.append(torch.stack([f(p) for p in (free, shared, rival) for f in (lambda p: mass_inside(mass, p), density)]))
    per_head = torch.stack(rows).mean(0).cpu()  # [6, members]
    vs, vs_cost, share, share_cost, rival, _ = per_head.mean(1).tolist()
    numbers = {
        "vertical_slash_recall": vs,
        "vertical_slash_density": vs_cost,
        "share_recall": share,
        "share_density": share_cost,
        "vertical_slash_recall_at_share_density": rival,
        "vertical_slash_recall_at_share_density_worst_head": float(per_head[4].min()),
    }
    return {"heads": len(members), **{k: round(v, 4) for k, v in numbers.items()}}


def wins(found: dict, coverage: float) -> bool:
    """Sharing pays when equal cost buys vertical-slash too little, and the pivot's dense pass is earned back."""
    better = found["share_recall"] > found["vertical_slash_recall_at_share_density"]
    fails = found["vertical_slash_recall_at_share_density_worst_head"] < coverage
    members = found["heads"]
    cheaper = 1 + (members - 1) * found["share_density"] < members * found["vertical_slash_density"]
    return better and fails and (cheaper or found["vertical_slash_recall"] < coverage)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write head_clusters.json.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--text", nargs="+", required=True, metavar="FOLDER[:WEIGHT]", help="prose first, code last")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--tau", type=float, default=0.4)
    parser.add_argument("--coverage", type=float, default=0.85)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = Decoder.load(args.model, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    text = corpus.load(args.text, held_out=True)

    domains, maps = [], []
    for domain, ids in calibration_prompts(text, args.length, seed=1):
        observer = observe(model, ids, args.block)
        domains.append(domain)
        maps.append(np.concatenate([pooled_log_mass(m) for m in observer.mass]))
    features = np.stack(maps, 1)  # [heads, prompts, GRID * GRID]
    labels = group(features.reshape(len(features), -1))
    of = lambda wanted: features[:, [d == wanted for d in domains]].reshape(len(features), -1)  # noqa: E731
    stability = {
        f"{a}_{b}": round(adjusted_rand_index(group(of(a)), group(of(b))), 3)
        for a, b in (("retrieval", "text"), ("retrieval", "code"), ("text", "code"))
    }

    held_out = [observe(model, ids, args.block) for _, ids in calibration_prompts(text, args.length, seed=2)]
    num_heads = model.num_heads
    groups = [[divmod(int(i), num_heads) for i in np.flatnonzero(labels == label)] for label in range(1, labels.max() + 1)]
    groups = sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), g))
    clusters, statistics, shared = {}, {}, []
    for number, members in enumerate(groups):
        clusters[str(number)] = [list(m) for m in members]
        statistics[str(number)] = found = benefit(members, held_out, args.gamma)
        if wins(found, args.coverage):
            shared.append(str(number))
        print(number, "shared" if str(number) in shared else "      ", found, members)
    print("adjusted Rand index between domains", stability)
    result = {
        "format_version": 1,
        "clusters": clusters,
        "shared_clusters": shared,
        "thresholds": {"gamma": args.gamma, "tau": args.tau, "delta": 1.0, "coverage": args.coverage},
        "calibration": {
            "prompts": dict(zip(*np.unique(domains, return_counts=True))),
            "length": args.length,
            "block": args.block,
            "grid": GRID,
            "linkage": "average, on log block mass",
            "cut": CUT,
            "stability_adjusted_rand_index": stability,
        },
        "statistics": statistics,
    }
    text_form = json.dumps(result, indent=1, default=int)
    args.out.write_text(compact_pairs(text_form) + "\n")


def compact_pairs(text: str) -> str:
    """[layer, head] on one line."""
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)


if __name__ == "__main__":
    main()
