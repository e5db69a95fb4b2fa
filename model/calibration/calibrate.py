#!/usr/bin/env python3
"""Finds the sparsest thresholds whose loss you accept, by serving the model, and writes them to head_clusters.json.

    calibrate.py --prefilld build/release/bin/prefilld --model MODEL --max_perplexity_rise=0.01 PROMPTS

PROMPTS are files or folders as prefill-calibrate takes them: .json with token ids, .txt for byte-level models; the
folder's name is the kind of text. Half of each kind chooses, the other half judges: the rise of perplexity that is
written is that of prompts which had no part in the choice. Finished runs are kept in a .jsonl beside --out, and the
same command goes on after them. Needs the Python client's packages (grpcio, protobuf, numpy, xxhash).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cluster_file
import loss_search
from cluster_file import ClusterFile
from loss_search import Loss, Prompt
from served_runs import Journal, Server, measure

DENSE, SHARE = "dense", "share"
# These are the candidates unless --candidates names others: each line thresholds of `share`, the densest first. The
# least budget falls with them: kept at 128, it would be most of what is computed in a model whose heads need no budget.
# gamma is that of pivots' patterns, and does nothing without --clusters.
CANDIDATES = [
    f"gamma={threshold},score_threshold={threshold},last_rows_gamma={last_rows},min_budget_tokens={budget}"
    for threshold, last_rows, budget in (
        (0.99, 0.7, 128), (0.98, 0.6, 128), (0.97, 0.5, 128), (0.96, 0.5, 128), (0.95, 0.5, 128), (0.95, 0.3, 128),
        (0.93, 0.3, 64), (0.93, 0.3, 32), (0.92, 0.3, 0), (0.9, 0.3, 0), (0.87, 0.3, 0), (0.8, 0.3, 0), (0.7, 0.3, 0),
        (0.6, 0.3, 0), (0.5, 0.2, 0),
    )
]  # fmt: skip
Thresholds = dict[str, float]


def parse_candidate(line: str) -> Thresholds:
    """Turns gamma=0.9,tau=0.4 into thresholds. Raises ValueError."""
    thresholds = {}
    for item in line.split(","):
        name, _, value = item.partition("=")
        try:
            thresholds[name.strip()] = float(value) if "." in value else int(value)
        except ValueError:
            raise ValueError(f"candidate {line!r}: {item!r} is not NAME=NUMBER") from None
    return thresholds


def read_candidates(path: Path | None) -> list[Thresholds]:
    lines = CANDIDATES if path is None else [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    candidates = [parse_candidate(line) for line in lines if line]
    if not candidates:
        raise ValueError(f"{path} names no candidate")
    return candidates


def read_prompts(paths: list[Path], bos: int | None) -> list[Prompt]:
    """Reads prompts as prefill-calibrate does. Raises ValueError that begins with the path."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    prompts = []
    for file in (f for f in files if f.suffix in (".json", ".txt")):
        domain = file.parent.name
        if file.suffix == ".txt":
            tokens = [*([] if bos is None else [bos]), *file.read_bytes()]
        else:
            held = json.loads(file.read_text())
            if isinstance(held, dict):
                held, domain = held.get("token_ids"), held.get("domain", domain)
            if not isinstance(held, list) or not all(isinstance(token, int) for token in held):
                raise ValueError(f"{file}: no list of token ids")
            tokens = held
        if len(tokens) < 2:
            raise ValueError(f"{file}: {len(tokens)} tokens; a prompt has at least 2")
        prompts.append(Prompt(str(file), domain, tuple(tokens)))
    if not prompts:
        raise ValueError(f"no .json and no .txt in {' '.join(map(str, paths))}")
    return prompts


class Losses:
    """The losses of candidates, measured on a running prefilld when first asked for."""

    def __init__(self, address: str, journal: Journal, candidates: list[Thresholds]):
        self._address, self._journal, self._candidates = address, journal, candidates

    def of(self, part: str, prompts: list[Prompt], candidate: int) -> Loss:
        dense = self._run(part, prompts, DENSE, {})
        run = self._run(part, prompts, SHARE, self._candidates[candidate])
        lost = [a - b for n in run["nats"] for a, b in zip(run["nats"][n], dense["nats"][n], strict=True)]
        tokens = [int(n) for n in run["nats"] for _ in run["nats"][n]]
        weights = Counter(str(len(prompt.tokens)) for prompt in prompts)
        density = sum(run["density"][n] * weights[n] for n in weights) / len(prompts)
        return Loss(tuple(lost), tuple(tokens), density)

    def _run(self, part: str, prompts: list[Prompt], policy: str, thresholds: Thresholds) -> dict:
        listed = ",".join(f"{name}={value}" for name, value in thresholds.items())
        name = f"{part} {policy} {listed}".strip()
        if name not in self._journal.runs:
            by_length: dict[int, list[list[int]]] = {}
            for prompt in prompts:
                by_length.setdefault(len(prompt.tokens), []).append(list(prompt.tokens))
            begin = time.monotonic()
            self._journal.add(measure(name, policy, self._address, by_length, thresholds))
            print(f"{name}: {time.monotonic() - begin:.0f} s for {len(prompts)} prompts", file=sys.stderr)
        return self._journal.runs[name]


def groups_of(args: argparse.Namespace) -> ClusterFile:
    """Returns the groups that --clusters names, with thresholds of their own left out; none without it."""
    if args.clusters is None:
        return ClusterFile({}, [])
    config = json.loads((args.model / "config.json").read_text())
    file = cluster_file.read(args.clusters, config["num_hidden_layers"], config["num_attention_heads"])
    return ClusterFile(file.clusters, file.shared, fingerprint=file.fingerprint, sharing=file.sharing)


def fingerprint_of(address: str) -> str:
    from prefilld import PrefillClient

    with PrefillClient(address) as client:
        return client.server_info().model_fingerprint


def calibrate(args: argparse.Namespace) -> bool:
    """Returns whether a candidate keeps the promise; only then a file is written."""
    candidates = read_candidates(args.candidates)
    config = json.loads((args.model / "config.json").read_text())
    prompts = read_prompts(args.prompts, config.get("bos_token_id"))
    if config.get("byte_tokens") is not True:
        for text in (prompt.name for prompt in prompts if prompt.name.endswith(".txt")):
            raise ValueError(f'{text}: {args.model} does not say "byte_tokens": true in its config.json; a text is no prompt')
    choosing, judging = loss_search.split(prompts)
    digest = hashlib.sha256(json.dumps([[p.domain, p.tokens] for p in prompts]).encode()).hexdigest()[:16]
    groups = groups_of(args)
    subject = {
        "model": str(args.model.resolve()),
        "device": args.device,
        "groups": groups.clusters and {name: groups.clusters[name] for name in groups.shared},
        "sharing": groups.sharing,
        "prompts_digest": digest,
    }
    journal = Journal(args.out.with_suffix(".calibration.jsonl"), json.loads(json.dumps(subject)))
    longest = max(len(prompt.tokens) for prompt in prompts)
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        served = Path(folder) / "groups.json"
        cluster_file.write(served, groups)
        with Server(args.prefilld, args.model, args.device, longest).serving(served) as address:
            losses = Losses(address, journal, candidates)
            rise = args.max_perplexity_rise
            first = loss_search.sparsest(len(candidates), lambda i: losses.of("choosing", choosing, i), rise)
            chosen, judged = None, 0
            if first is not None:
                chosen, judged = loss_search.confirmed(first, lambda i: losses.of("judging", judging, i), rise)
            if chosen is None:
                print(f"no candidate keeps perplexity within {100 * rise:g} % of dense; nothing is written, and the "
                      "model is best served with --policy=dense")  # fmt: skip
                return False
            loss = losses.of("judging", judging, chosen)
            groups.fingerprint = fingerprint_of(address)
    groups.thresholds = candidates[chosen]
    written = {
        "max_perplexity_rise": rise,
        "measured": loss.described(),
        "candidates_judged": judged,
        "shortest_tokens": min(len(prompt.tokens) for prompt in judging),
        "longest_tokens": max(len(prompt.tokens) for prompt in judging),
        "prompts": dict(sorted(Counter(prompt.domain for prompt in prompts).items())),
        "prompts_digest": digest,
        "device": args.device,
    }
    cluster_file.write(args.out, groups, written)
    print(f"{args.out}: {groups.thresholds}; perplexity rises by {100 * loss.rise:.2f} % (standard error "
          f"{100 * loss.error:.2f}, worst prompt {100 * loss.worst:.2f}) on {len(judging)} prompts that had no part in "
          f"the choice, at a density of {loss.density:.3f}")  # fmt: skip
    return True


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", type=Path, help="prompt files, or folders of them")
    parser.add_argument("--prefilld", type=Path, required=True, help="the program")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--max_perplexity_rise", type=float, default=0.01, help="that you accept (%(default)s: 1 %%)")
    parser.add_argument("--out", type=Path, help="the file; head_clusters.json of the model when absent")
    parser.add_argument("--candidates", type=Path, help="file of thresholds of share, a line each, the densest first")
    parser.add_argument("--clusters", type=Path, help="file whose groups share; none: each head by itself")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    args.out = args.out or args.model / "head_clusters.json"
    if not 0 < args.max_perplexity_rise < 1:
        parser.error(f"--max_perplexity_rise {args.max_perplexity_rise} is outside (0, 1)")
    return args


if __name__ == "__main__":
    try:
        sys.exit(0 if calibrate(read_arguments()) else 1)
    except KeyboardInterrupt:
        sys.exit("calibrate.py: stopped; the same command goes on after the runs that are finished")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"calibrate.py: {error}")
