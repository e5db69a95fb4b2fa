#!/usr/bin/env python3
"""Scores what is served: sends retrieval prompts and held-out text to a live decode worker, for each attention setting.

    PYTHONPATH=client/python python3 tests/evaluation/evaluate.py \
        --server localhost:50051 --worker localhost:50052 --out build/evaluation

Finished prompts are kept in OUT/results.jsonl; the same command goes on where it was stopped. At the
end, and after Ctrl-C or --seconds, OUT/summary.json and OUT/table.txt hold the figures. README.md in
this folder explains them. Needs the Python client (grpcio, protobuf, numpy, xxhash).
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

import prompts
import scoring
import settings
import table
from journal import Journal
from prefilld import Attention, DecodeClient, PrefillClient, Sampling, retry_after
from prefilld.wire import enum_name
from progress import Progress

DEFAULT_SETTINGS = [
    "dense",
    "vertical_slash:gamma=0.8/0.9/0.95/0.98",
    "share:gamma=0.8/0.9/0.95",
    # Left out unless the server allows them (--allowed_policies).
    "baseline_query_aware:tau=0.1/1.0,gamma=0.8/0.9/0.95",
    "baseline_random:density=0.3",
]
HEAD_COUNTS = ("dense_heads", "pivot_heads", "shared_heads", "vertical_slash_heads", "baseline_heads")
TOP_LOGPROBS = 20  # the protocol's limit
RETRIES = 8  # in a row, of one prompt, when the server is full or restarting


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:50051", help="host:port of prefilld")
    parser.add_argument("--worker", default="localhost:50052", help="host:port of the decode worker")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", default=[*prompts.TASKS, prompts.TEXT], metavar="TASK")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 32768], metavar="TOKENS")
    parser.add_argument("--settings", nargs="+", default=DEFAULT_SETTINGS, metavar="POLICY[:NAME=V/V...,...]",
                        help="for example share:gamma=0.8/0.9,tau=0.4; what is not set is the server's default")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=200, help="per task, length and setting")
    parser.add_argument("--text_prompts", type=int, help="as many of held-out text; one token each; default --prompts")
    parser.add_argument("--depths", type=int, default=11, help="depths from 0 to 100 %% that take turns")
    parser.add_argument("--text", nargs="+", default=[], metavar="FOLDER[:WEIGHT]",
                        help="text the model was trained on: its held-out part is used")  # fmt: skip
    parser.add_argument("--unseen_text", nargs="+", default=[], metavar="FOLDER", help="text it was not trained on")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; none: the embedded model's bytes")
    parser.add_argument("--audit_every", type=int, default=10, metavar="N",
                        help="measure recall on every Nth prompt; 0: on none")  # fmt: skip
    parser.add_argument("--audit_rows", type=int, default=8, help="query blocks per layer that it looks at")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=2, help="requests outstanding at once")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one prompt, waiting included")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop starting prompts after this time")
    args = parser.parse_args()
    unknown = [t for t in args.tasks if t not in (*prompts.TASKS, prompts.TEXT)]
    if unknown:
        parser.error(f"task {unknown[0]!r} unknown; one of {', '.join((*prompts.TASKS, prompts.TEXT))}")
    try:
        args.settings = settings.parse_all(args.settings)
    except ValueError as error:
        parser.error(str(error))
    return args


def answer(worker: DecodeClient, prompt: prompts.Prompt, setting: settings.Setting, audit_rows: int, timeout: float):
    """Tokens and the worker's GenerateResult."""
    sampling = Sampling(top_logprobs=TOP_LOGPROBS if prompt.task == prompts.TEXT else 0)
    attention = Attention(**setting.fields(), recall_audit_rows=audit_rows)
    with worker.generate(
        prompt.tokens, prompt.max_new_tokens, sampling=sampling, attention=attention, timeout=timeout
    ) as stream:
        return list(stream), stream.result


def recall(audit) -> dict[str, list[float]]:
    """Of every head that was sparse, by kind."""
    kinds = {kind: getattr(audit, kind).heads for kind in scoring.SPARSE_KINDS}
    return {kind: [round(value, 4) for value in heads] for kind, heads in kinds.items() if heads}


def record(prompt: prompts.Prompt, setting: settings.Setting, tokens, result, codec, vocab_size: int) -> dict:
    total = result.prefill.total
    kinds = {name: getattr(total, name) for name in HEAD_COUNTS}
    made = {
        "setting": setting.name,
        "task": prompt.task,
        "length": prompt.length,
        "index": prompt.index,
        "depth": prompt.depth,
        "tokens": len(prompt.tokens),
        "policy": enum_name("AttentionPolicy", result.prefill.policy),
        "density": total.density,
        "heads": sum(kinds.values()),
        **kinds,
        "ttft_us": result.ttft_us,
        "compute_us": result.prefill.compute_us,
        "queue_us": result.prefill.queue_us,
        "attention_us": total.attention_us,
        "pattern_us": total.pattern_us,
        **({"recall": recall(total.recall)} if total.HasField("recall") else {}),
    }
    if prompt.task == prompts.TEXT:
        logprob, reported = scoring.next_token_logprob(tokens[0].top_logprobs, prompt.next_token, vocab_size)
        return {**made, "logprob": logprob, "reported": reported}
    generated = codec.decode([t.id for t in tokens])
    return {
        **made,
        "right": scoring.is_right(prompt.answer, generated),
        "answer": prompt.answer.decode(errors="replace"),
        "generated": generated.decode(errors="replace"),
    }


class Evaluation:
    """Threads take the next prompt that is not done, ask, and note the answer."""

    def __init__(self, args: argparse.Namespace, info, source: prompts.Prompts, codec, journal: Journal):
        self._args, self._info, self._source, self._codec, self._journal = args, info, source, codec, journal
        self._jobs = self._pending()
        self._taking = threading.Lock()
        self._end = time.monotonic() + args.seconds
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        total = sum(1 for _ in self._keys())
        self._progress = Progress(total, sum(self._journal.has(key) for key in self._keys()))

    def _keys(self) -> Iterator[tuple[str, str, int, int]]:
        """Short prompts first, all settings of a prompt together, tasks by turns: whatever is done is comparable."""
        counts = {task: self._args.prompts for task in self._args.tasks}
        if prompts.TEXT in counts and self._args.text_prompts is not None:
            counts[prompts.TEXT] = self._args.text_prompts
        for length in self._args.lengths:
            for index in range(max(counts.values(), default=0)):
                for task in (t for t in counts if index < counts[t]):
                    for setting in self._args.settings:
                        yield setting.name, task, length, index

    def _pending(self) -> Iterator[tuple[prompts.Prompt, settings.Setting]]:
        by_name = {s.name: s for s in self._args.settings}
        prompt = None
        for key in self._keys():
            if self._journal.has(key):
                continue
            name, *rest = key
            if prompt is None or (prompt.task, prompt.length, prompt.index) != tuple(rest):
                prompt = self._source.make(*rest)
            yield prompt, by_name[name]

    def _take(self):
        with self._taking:
            if self._stop.is_set() or time.monotonic() > self._end:
                return None
            return next(self._jobs, None)

    def _audit_rows(self, prompt: prompts.Prompt) -> int:
        every = self._args.audit_every
        return self._args.audit_rows if every and prompt.index % every == 0 else 0

    def _ask(self, worker: DecodeClient, prompt: prompts.Prompt, setting: settings.Setting):
        for attempt in range(RETRIES + 1):
            try:
                return answer(worker, prompt, setting, self._audit_rows(prompt), self._args.timeout)
            except grpc.RpcError as error:
                passing = error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
                if not passing or attempt == RETRIES or self._stop.wait(retry_after(error) or 0.5 * 2**attempt):
                    raise

    def _work(self) -> None:
        try:
            with DecodeClient(self._args.worker) as worker:
                while (job := self._take()) is not None:
                    prompt, setting = job
                    tokens, result = self._ask(worker, prompt, setting)
                    made = record(prompt, setting, tokens, result, self._codec, self._info.vocab_size)
                    self._journal.add(made)
                    self._progress.step(made)
        except BaseException as error:  # the main thread raises it
            self._failure = self._failure or error
            self._stop.set()

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._args.concurrency)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            print("\nfinishing the prompts under way; the same command goes on later", file=sys.stderr)
            self._stop.set()
            for thread in threads:
                thread.join()
        self._progress.close()
        if self._failure:
            raise self._failure


def restrict(args: argparse.Namespace, info, text) -> None:
    """Leaves out, and says so, what this server or this call cannot do."""
    allowed = [enum_name("AttentionPolicy", p) for p in info.allowed_policies]
    for setting in [s for s in args.settings if s.policy not in allowed]:
        print(f"left out: {setting.name}; the server allows {', '.join(allowed)}", file=sys.stderr)
        args.settings.remove(setting)
    for length in [n for n in args.lengths if n > info.max_prompt_tokens]:
        print(f"left out: {length} tokens; the server takes {info.max_prompt_tokens}", file=sys.stderr)
        args.lengths.remove(length)
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: with a summary
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
            "text": args.text + args.unseen_text,
            "text_digest": prompts.digest(text),
        }
        journal = Journal(args.out, subject)
        source = prompts.Prompts(codec, text, args.depths, args.seed, info.max_prompt_tokens)
        try:
            Evaluation(args, info, source, codec, journal).run()
        finally:
            if journal.records:
                write_summary(args, info, journal.records)
    except grpc.RpcError as error:
        print(f"evaluate.py: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
