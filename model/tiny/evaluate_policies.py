#!/usr/bin/env python3
"""Scores and densities of the attention policies on the embedded model.

    evaluate_policies.py --model FOLDER --text DOCS --out policies.json

Per policy: the retrieval tasks; `interleaved`, where every row asks (share of values recalled); and `text`, bits per byte
of held-out text. Each `share` is followed by vertical-slash with the gamma that costs as many blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import corpus
import tasks
from decoder import Decoder
from evaluate import examples
from reference_policies import Policy, Prefill, Trace, answers_right, read_clusters


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Scorer:
    """Scores one task at one length, with the same prompts for every policy."""

    def __init__(self, model: Decoder, task: str, length: int, count: int, text: corpus.Corpus):
        self.model, self.task, self.length = model, task, length
        rng = random.Random(f"{task} {length}")
        if task == "text":
            self.prompts = [text.filler(rng, length - 1) for _ in range(max(1, count // 4))]
        elif task == "interleaved":
            self.prompts = [tasks.interleaved(rng, length) for _ in range(max(1, count // 4))]
        else:
            self.prompts = examples(task, length, count, text)

    def __call__(self, policy: Policy, clusters: dict, limit: int | None = None) -> dict:
        scores, traces = [], []
        for prompt in self.prompts[:limit]:
            prefill = Prefill(policy, clusters)
            scores.append(self._score(prompt, prefill))
            traces.append(prefill.trace)
        result = {"task": self.task, "length": self.length, **asdict(policy), **summary(scores, traces)}
        return result if policy.with_recall else {**result, "recall": None}

    def _score(self, prompt, prefill: Prefill) -> float:
        if self.task == "text":
            logits, ids = self._run(prompt, prefill)
            return float(F.cross_entropy(logits[:-1], ids[1:])) / math.log(2)
        if self.task == "interleaved":
            lines, spans = prompt
            logits, ids = self._run(lines, prefill)
            right = logits[:-1].argmax(-1) == ids[1:]  # right[i]: byte i of the lines, as BOS comes first
            return float(torch.stack([right[begin:end].all() for begin, end in spans]).float().mean())
        return float(answers_right(self.model, prompt, prefill))

    @torch.no_grad()
    def _run(self, prompt: bytes, prefill: Prefill) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor(tasks.encode(prompt), device=self.model.embedding.device)
        return self.model.logits(self.model(ids[None], prefill)[0]), ids


def summary(scores: list[float], traces: list[Trace]) -> dict:
    kinds = [kind for trace in traces for kind in trace.kinds]
    recall = [r for trace in traces for r in trace.recall]
    return {
        "prompts": len(scores),
        "score": round(mean(scores), 4),
        "density": round(mean([mean(t.density) for t in traces]), 4),
        "recall": round(mean(recall), 4),
        "heads": {k: round(kinds.count(k) / len(traces), 1) for k in ("dense", "pivot", "shared", "vertical_slash")},
    }


def gamma_of_density(scorer: Scorer, policy: Policy, density: float) -> float:
    """Finds the gamma at which vertical-slash has this density, from two prompts."""
    low, high = 0.0, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        if scorer(replace(policy, gamma=middle), {}, limit=2)["density"] < density:
            low = middle
        else:
            high = middle
    return round((low + high) / 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores and densities of the attention policies.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--clusters", type=Path, default=None, help="head_clusters.json; that of the model when absent")
    parser.add_argument("--text", nargs="+", required=True, metavar="FOLDER[:WEIGHT]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="pass_key,interleaved,text")
    parser.add_argument("--lengths", default="16384,8192")
    parser.add_argument("--blocks", default="64,128")
    parser.add_argument("--gammas", default="0.9,0.95,0.8", help="of share, the most telling first")
    parser.add_argument("--tau", type=float, default=0.4)
    parser.add_argument("--coverage", type=float, default=0.85)
    parser.add_argument("--prompts", type=int, default=48, help="a quarter of it for interleaved and text")
    parser.add_argument("--recall", action="store_true", help="measure recall as well, which is slow")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no other policy after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    begin = time.monotonic()
    model = Decoder.load(args.model, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    clusters = read_clusters(args.clusters or args.model / "head_clusters.json")
    text = corpus.load(args.text, held_out=True)
    results: list[dict] = []

    def measure(scorer: Scorer, policy: Policy) -> dict:
        result = scorer(policy, clusters)
        results.append(result)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(
            f"{result['task']:12s} {result['length']:6d}  {policy.name:14s} b {policy.block:3d}  gamma {policy.gamma:.3f}"
            f"  score {result['score']:.3f}  density {result['density']:.3f}  recall {result['recall']}"
            f"  {result['heads']}  {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        return result

    lists = [args.gammas.split(","), args.lengths.split(","), args.blocks.split(",")]
    for gamma, length, block in [(float(g), int(n), int(b)) for g in lists[0] for n in lists[1] for b in lists[2]]:
        for task in args.tasks.split(","):
            if time.monotonic() - begin > args.seconds:
                return
            scorer = Scorer(model, task, length, args.prompts, text)
            policy = Policy("share", block, gamma, args.tau, args.coverage, args.recall)
            share = measure(scorer, policy)
            rival = replace(policy, name="vertical_slash")
            measure(scorer, replace(rival, gamma=gamma_of_density(scorer, rival, share["density"])))
            if (gamma, block) == (float(lists[0][0]), int(lists[2][0])):
                measure(scorer, rival)
                measure(scorer, replace(policy, name="dense"))


if __name__ == "__main__":
    main()
