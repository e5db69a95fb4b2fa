#!/usr/bin/env python3
"""Finds the heads that are worth computing exactly, by serving the model with one head exact at a time.

    exact_heads.py --prefilld build/release/bin/prefilld --model MODEL --text FOLDER --out exact_heads.json
    exact_heads.py --model MODEL --take 5.6 4.3 --write MODEL/head_clusters.json

A group of one head that shares is a head that is always exact. cluster_heads.py forms none, for it goes by attention
mass, and mass does not tell what its last tenth is worth to the predictions. Perplexity does: of the same texts, with
the head exact and without, beside dense attention. Finished heads are kept in a .jsonl beside --out, and the same
command goes on after them. README.md in this folder says what it costs. Measuring needs the Python client's packages
(grpcio, protobuf, numpy, xxhash), --take none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock

import cluster_file
from cluster_file import ClusterFile, Pair
from served_runs import Journal, Server, Texts, measure, read_texts

DENSE, BEFORE = "dense", "before"  # what heads are compared with: exact attention, and the file as it is


def name_of(head: Pair) -> str:
    return f"{head[0]}.{head[1]}"


def parse_heads(listed: list[str], num_layers: int, num_heads: int) -> list[Pair]:
    """Parses heads: 5.6 is a head, 5 is all heads of a layer, 3-5 is all heads of three layers."""
    found: dict[Pair, None] = {}
    for item in listed:
        match = re.fullmatch(r"(\d+)(?:\.(\d+)|-(\d+))?", item)
        if not match:
            raise ValueError(f"{item!r} is neither a head (5.6) nor a layer (5) nor layers (3-5)")
        first, head, last = (text and int(text) for text in match.groups())
        last = first if last is None else last
        if not (first <= last < num_layers and (head or 0) < num_heads):
            raise ValueError(f"{item!r} is outside {num_layers} layers of {num_heads} heads")
        heads = range(num_heads) if head is None else [head]
        found |= dict.fromkeys((layer, h) for layer in range(first, last + 1) for h in heads)
    return list(found)


def sharing_heads(file: ClusterFile) -> set[Pair]:
    return {head for name in file.shared for head in file.clusters[name]}


def with_exact(file: ClusterFile, heads: list[Pair]) -> ClusterFile:
    """Returns the file with a sharing group for each of these heads. Everything else keeps its name and order."""
    if taken := sharing_heads(file) & set(heads):
        raise ValueError(f"head {name_of(min(taken))} is in a group that shares already")
    clusters = {name: [head for head in group if head not in heads] for name, group in file.clusters.items()}
    free = (str(n) for n in range(len(file.clusters) + len(heads)) if str(n) not in file.clusters)
    own = {next(free): [head] for head in heads}
    left = {name: group for name, group in clusters.items() if group}
    return replace(file, clusters=left | own, shared=[*file.shared, *own])


def take(source: Path, target: Path, heads: list[Pair], shape: tuple[int, int]) -> None:
    """Keeps what the source says about its making, except the statistics of groups that lose a head."""
    before, data = cluster_file.read(source, *shape), json.loads(source.read_text())
    after = with_exact(before, heads)
    calibration, statistics = data.get("calibration"), data.get("statistics")
    if calibration is not None:
        exact = [*calibration.get("exact_heads", []), *map(name_of, heads)]
        calibration = {**calibration, "exact_heads": exact}
    if statistics is not None:
        statistics = {n: s for n, s in statistics.items() if after.clusters.get(n) == before.clusters.get(n)}
    cluster_file.write(target, after, calibration, statistics)


@dataclass(frozen=True)
class Row:
    head: str
    perplexity_to_dense: dict[str, float]  # by length
    gain: float  # by what part perplexity falls: nats a token, mean of all texts
    gain_error: float | None  # its standard error over the texts
    density_added: float  # mean over lengths
    gain_per_density: float


def falls(before: dict, after: dict, length: str) -> list[float]:
    """Returns how much each text's nats per token fall."""
    return [b - a for b, a in zip(before["nats"][length], after["nats"][length], strict=True)]


def to_dense(runs: dict[str, dict], name: str) -> dict[str, float]:
    """Returns the perplexity of a run over dense perplexity, by length."""
    return {length: math.exp(-fmean(falls(runs[DENSE], runs[name], length))) for length in runs[name]["nats"]}


def row_of(runs: dict[str, dict], name: str, heads_of_model: int) -> Row:
    before, after = runs[BEFORE], runs[name]
    fallen = [value for length in after["nats"] for value in falls(before, after, length)]
    error = stdev(fallen) / math.sqrt(len(fallen)) if len(fallen) > 1 else None
    added = fmean(after["density"][length] - before["density"][length] for length in after["density"])
    # One exact head changes what later heads attend to, and so their density. A head that seems to cost less than a
    # tenth of a head counts as a tenth.
    per_density = fmean(fallen) / max(added, 0.1 / heads_of_model)
    return Row(name, to_dense(runs, name), fmean(fallen), error, added, per_density)


def rank(runs: dict[str, dict], names: list[str], heads_of_model: int) -> list[Row]:
    """Ranks the heads by gain per density, the best first."""
    rows = [row_of(runs, name, heads_of_model) for name in names]
    return sorted(rows, key=lambda row: -row.gain_per_density)


def show(rows: list[Row], before: dict[str, float], density: float) -> None:
    ratios = lambda by_length: "".join(f"{ratio:10.4f}" for ratio in by_length.values())  # noqa: E731
    wide = 10 * len(before)
    print(f"{'perplexity / dense':>{8 + max(wide, 18)}}")
    lengths = "".join(f"{length:>10}" for length in before)
    print(f"{'head':<8}{lengths:>{max(wide, 18)}}      gain  ± error   density added   gain per density")
    print(f"{BEFORE:<8}{ratios(before):>{max(wide, 18)}}{f'of {density:.4f}':>34}")
    for row in rows:
        error = f"{row.gain_error:8.5f}" if row.gain_error is not None else f"{'–':>8}"
        print(
            f"{row.head:<8}{ratios(row.perplexity_to_dense):>{max(wide, 18)}}  {row.gain:8.5f} {error}"
            f"        {row.density_added:+8.4f}           {row.gain_per_density:8.4f}"
        )


def compared_with(server: Server, clusters: Path, texts: Texts, journal: Journal) -> None:
    """Adds the runs that heads are compared with, if the journal does not have them."""
    missing = [name for name in (DENSE, BEFORE) if name not in journal.runs]
    if not missing:
        return
    print("dense attention, and the file as it is", file=sys.stderr)
    with server.serving(clusters) as address:
        for name in missing:
            journal.add(measure(name, "dense" if name == DENSE else "share", address, texts))


def each_exact(
    server: Server, file: ClusterFile, heads: list[Pair], texts: Texts, journal: Journal, at_once: int
) -> None:
    """Adds a run for every head that the journal does not have, with `at_once` servers side by side."""
    left, begin = [head for head in heads if name_of(head) not in journal.runs], time.monotonic()
    one_writes = Lock()
    with tempfile.TemporaryDirectory(prefix="exact-heads-") as folder, ThreadPoolExecutor(at_once) as pool:

        def run(head: Pair) -> dict:
            clusters = Path(folder) / f"{name_of(head)}.json"
            cluster_file.write(clusters, with_exact(file, [head]))
            with server.serving(clusters) as address:
                record = measure(name_of(head), "share", address, texts)
            with one_writes:  # here, so that it is kept even if all is stopped meanwhile
                journal.add(record)
            return record

        try:
            for done, future in enumerate(as_completed([pool.submit(run, head) for head in left]), 1):
                record = future.result()
                minutes = (time.monotonic() - begin) / done * (len(left) - done) / 60
                ratios = " ".join(f"{ratio:.4f}" for ratio in to_dense(journal.runs, record["run"]).values())
                finished = f"{len(heads) - len(left) + done} of {len(heads)} heads, {minutes:.1f} min left"
                print(f"{finished}; {record['run']}: perplexity / dense {ratios}", file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # heads under way go on to their end, no other begins
            raise


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--clusters", type=Path, help="cluster file to start from; head_clusters.json of the model")
    parser.add_argument("--prefilld", type=Path, help="the program")
    parser.add_argument("--text", nargs="+", metavar="FOLDER", help="text like that you serve, not learnt from")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; none: the embedded model's bytes")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384, 32768], metavar="TOKENS")
    parser.add_argument("--texts", type=int, default=16, help="of each length")
    parser.add_argument("--heads", nargs="+", metavar="HEAD", help="heads (5.6), layers (5, 3-5); all when absent")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--servers", type=int, default=1, help="at once; each holds the weights")
    parser.add_argument("--seed", type=int, default=1, help="which texts")
    parser.add_argument("--out", type=Path, default=Path("exact_heads.json"), help="the table as JSON")
    parser.add_argument("--take", nargs="+", metavar="HEAD", help="measure nothing: make these heads exact, in --write")
    parser.add_argument("--write", type=Path, help="the cluster file with the heads of --take")
    args = parser.parse_args()
    args.clusters = args.clusters or args.model / "head_clusters.json"
    if bool(args.take) != bool(args.write):
        parser.error("--take and --write go together")
    if not args.take and not (args.prefilld and args.text):
        parser.error("--prefilld and --text are needed, or --take and --write")
    for name, least in (("texts", 1), ("servers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is below {least}")
    return args


def main() -> None:
    args = read_arguments()
    config = json.loads((args.model / "config.json").read_text())
    shape = config["num_hidden_layers"], config["num_attention_heads"]
    if args.take:
        take(args.clusters, args.write, parse_heads(args.take, *shape), shape)
        return
    if not args.tokenizer and config.get("byte_tokens") is not True:
        raise ValueError(f'{args.model} does not say "byte_tokens": true in its config.json, so --tokenizer is needed')
    file = cluster_file.read(args.clusters, *shape)
    asked = parse_heads(args.heads or [f"0-{shape[0] - 1}"], *shape)
    heads = [head for head in asked if head not in sharing_heads(file)]
    if not heads:
        raise ValueError(f"every head of {' '.join(args.heads or ['the model'])} is in a group that shares already")
    texts = read_texts(args.text, args.lengths, args.texts, args.tokenizer, args.seed)
    subject = {
        "model": str(args.model.resolve()),
        "device": args.device,
        "clusters_digest": hashlib.sha256(args.clusters.read_bytes()).hexdigest()[:16],
        "texts_digest": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
    }
    journal = Journal(args.out.with_suffix(".jsonl"), subject)
    server = Server(args.prefilld, args.model, args.device, max(args.lengths))
    compared_with(server, args.clusters, texts, journal)
    each_exact(server, file, heads, texts, journal, args.servers)

    before, density = to_dense(journal.runs, BEFORE), journal.runs[BEFORE]["density"]
    rows = rank(journal.runs, list(map(name_of, heads)), math.prod(shape))
    show(rows, before, fmean(density.values()))
    written = {**subject, "texts": args.texts, "before": {"perplexity_to_dense": before, "density": density},
               "heads": [asdict(row) for row in rows]}  # fmt: skip
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("exact_heads.py: stopped; the same command goes on after the heads that are finished")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"exact_heads.py: {error}")
