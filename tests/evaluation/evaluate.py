#!/usr/bin/env python3
"""Scores a served model on retrieval prompts and held-out text, for each attention setting.

    PYTHONPATH=client/python python3 tests/evaluation/evaluate.py \
        --server localhost:50051 --worker localhost:50052 --out build/evaluation

Questions at the end of a prompt go to the decode worker, questions within one and text to prefilld. Finished prompts
are kept in OUT/results.jsonl, so that the same command continues where it was stopped. At the end, and after Ctrl-C or
--seconds, the figures are written to OUT/summary.json and OUT/table.txt. README.md in this folder explains them. Needs
the Python client (grpcio, protobuf, numpy, xxhash).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path


import graded
import prompts
import scoring
import settings
import table
from asking import Asking
from crew import Crew, Job, PromptKey, Refused
from journal import Journal
from prefilld import PrefillClient, PrefilldError
from prefilld.wire import enum_name
from progress import Progress

DEFAULT_SETTINGS = [
    "dense",
    "vertical_slash:gamma=0.8/0.9/0.95/0.98",
    "share:gamma=0.8/0.9/0.95",
    # These are left out unless the server allows them (--allowed_policies).
    "baseline_query_aware:tau=0.1/1.0,gamma=0.8/0.9/0.95",
    "baseline_random:density=0.3",
]
PROMPT_LOGPROBS_LIMIT = 262_144  # tokens of a prompt that prefilld grades


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:50051", help="host:port of prefilld")
    parser.add_argument("--worker", default="localhost:50052", help="host:port of the decode worker")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", default=None, metavar="TASK",
                        help=f"of {', '.join(prompts.TASKS)}; default: all that the model has learnt")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 32768], metavar="TOKENS")
    parser.add_argument("--settings", nargs="+", default=DEFAULT_SETTINGS, metavar="POLICY[:NAME=V/V...,...]",
                        help="for example share:gamma=0.8/0.9,tau=0.4; what is not set is the server's default")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=200, help="per task, length and setting")
    parser.add_argument("--depths", type=int, default=11, help="depths from 0 to 100 %% that take turns")
    parser.add_argument("--text", nargs="+", default=[], metavar="FOLDER[:WEIGHT]",
                        help="text the model was trained on: its held-out part is used")  # fmt: skip
    parser.add_argument("--unseen_text", nargs="+", default=[], metavar="FOLDER", help="text it was not trained on")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; none: the embedded model's bytes")
    parser.add_argument("--audit_every", type=int, default=10, metavar="N",
                        help="measure recall on every Nth prompt; 0: on none")  # fmt: skip
    parser.add_argument("--audit_rows", type=int, default=8, help="query blocks per layer that it looks at")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=2, help="requests outstanding at once, each of a process")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one prompt, waiting included")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop starting prompts after this time")
    args = parser.parse_args()
    if args.tasks is None:
        args.tasks = [t for t in prompts.TASKS if args.tokenizer or t not in prompts.NOT_LEARNT]
    if unknown := [t for t in args.tasks if t not in prompts.TASKS]:
        parser.error(f"task {unknown[0]!r} unknown; one of {', '.join(prompts.TASKS)}")
    try:
        args.settings = settings.parse_all(args.settings)
    except ValueError as error:
        parser.error(str(error))
    return args


def questions(args: argparse.Namespace) -> Iterator[PromptKey]:
    """Orders the questions: short prompts first and tasks in turn, so that what is done at any time can be compared."""
    for length in args.lengths:
        for index in range(args.prompts):
            for task in args.tasks:
                if prompts.group(task) == "end" or length <= PROMPT_LOGPROBS_LIMIT:
                    yield task, length, index


def pending(args: argparse.Namespace, journal: Journal) -> list[Job]:
    """Returns what is not done."""
    named = [(key, [s for s in args.settings if not journal.has((s.name, *key))]) for key in questions(args)]
    return [(key, left) for key, left in named if left]


def evaluate(args: argparse.Namespace, jobs: list[Job], crew: Crew, journal: Journal) -> None:
    total = sum(len(args.settings) for _ in questions(args))
    progress = Progress(total, total - sum(len(left) for _, left in jobs))
    end = time.monotonic() + args.seconds

    def stop(*_) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nfinishing the prompts under way; the same command goes on later", file=sys.stderr)
        crew.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for record in crew.records(jobs):
        journal.add(record)
        progress.step(record)
        if time.monotonic() > end:
            crew.stop()
    progress.close()


def restrict(args: argparse.Namespace, info, text) -> None:
    """Leaves out what this server or this call cannot do, and says so."""
    allowed = [enum_name("AttentionPolicy", p) for p in info.allowed_policies]
    for setting in [s for s in args.settings if s.policy not in allowed]:
        print(f"left out: {setting.name}; the server allows {', '.join(allowed)}", file=sys.stderr)
        args.settings.remove(setting)
    for length in [n for n in args.lengths if n > info.max_prompt_tokens]:
        print(f"left out: {length} tokens; the server takes {info.max_prompt_tokens}", file=sys.stderr)
        args.lengths.remove(length)
    for length in (n for n in args.lengths if n > PROMPT_LOGPROBS_LIMIT):
        print(f"left out: text and questions within {length} tokens; at most {PROMPT_LOGPROBS_LIMIT}", file=sys.stderr)
    if text is None and prompts.TEXT in args.tasks:
        print("left out: perplexity of held-out text; --text and --unseen_text name folders with some", file=sys.stderr)
        args.tasks.remove(prompts.TEXT)


def write_summary(args: argparse.Namespace, info, records: list[dict]) -> None:
    summary = {
        "model": info.model_name,
        "model_fingerprint": info.model_fingerprint,
        "device": info.device,
        "server_version": info.version,
        "seed": args.seed,
        **scoring.summarize(records, [s.name for s in args.settings]),
    }
    (args.out / "summary.json").write_text(table.as_json(summary))
    text = f"{info.model_name} on {info.device}\n\n{table.render(summary)}"
    (args.out / "table.txt").write_text(text + "\n")
    print(text)


def main() -> int:
    args = read_arguments()
    try:
        with PrefillClient(args.server) as server:
            info = server.server_info()
        codec = prompts.TokenizerCodec(args.tokenizer) if args.tokenizer else prompts.ByteCodec()
        text = prompts.load_text(args.text, args.unseen_text)
        restrict(args, info, text)
        subject = {
            "model_fingerprint": info.model_fingerprint,
            "device": info.device,
            "seed": args.seed,
            "depths": args.depths,
            "asked_within": [graded.EARLIEST, graded.LATEST],
            "text": args.text + args.unseen_text,
            "text_digest": prompts.digest(text),
        }
        journal = Journal(args.out, subject)
        source = prompts.Prompts(codec, text, args.depths, args.seed, info.max_prompt_tokens)
        asking = Asking(args.server, args.worker, args.timeout, args.audit_every, args.audit_rows)
        try:
            jobs = pending(args, journal)
            with Crew(min(args.concurrency, len(jobs)), source, codec, asking) as crew:
                evaluate(args, jobs, crew, journal)
        finally:
            if journal.records:
                write_summary(args, info, journal.records)
    except (Refused, PrefilldError, ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
