#!/usr/bin/env python3
"""Measures, through a real server, what each attention setting does to the perplexity of real text.

    python3 tests/evaluation/real_weights/measure.py --prefilld build/release/bin/prefilld \
        --model FOLDER --stretched FOLDER --texts FOLDER --out build/real_weights --lengths 2048:48 8192:48 16384:24

Starts prefilld on the model, and for texts longer than its positions on the stretched one. Settings come from a file,
one a line, the most important first: each is measured on all lengths before the next, and summary.json and table.txt
are written after every one, so that a run that is cut off has all that it finished. The same command goes on where it
was stopped; results.jsonl keeps every text. Needs the packages of the Python client (grpcio, protobuf, numpy, xxhash).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "client" / "python")]
import contract  # noqa: E402
import grpc  # noqa: E402
import live_processes  # noqa: E402
import numpy as np  # noqa: E402
import settings  # noqa: E402
import sources  # noqa: E402
import text_scores  # noqa: E402
import texts  # noqa: E402
from journal import Journal  # noqa: E402
from prefilld import Attention, Layout, PrefillClient, PrefilldError  # noqa: E402
from prefilld.wire import enum_name  # noqa: E402

BLOCK_TOKENS = 16
REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefilld", type=Path, required=True, help="the server program")
    parser.add_argument("--model", type=Path, required=True, help="model folder, of get_model.py")
    parser.add_argument("--stretched", type=Path, help="model folder for longer texts")
    parser.add_argument("--texts", type=Path, required=True, help="folder of prepare_texts.py")
    parser.add_argument("--role", choices=sources.ROLES, default="judging", help="texts that are used (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--lengths", nargs="+", default=["8192:48"], metavar="TOKENS:TEXTS",
                        help="lengths in order of importance, and how many texts of each (%(default)s)")  # fmt: skip
    parser.add_argument("--settings", type=Path, default=HERE / "settings.txt", help="file of settings (%(default)s)")
    parser.add_argument("--device", default="auto", help="of the server: auto, cpu or cuda")
    parser.add_argument("--clusters", type=Path, help="head_clusters.json for the server; none: no sharing of patterns")
    parser.add_argument("--concurrency", type=int, default=2, help="requests outstanding at once")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one text, waiting included")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop starting texts after this time")
    args = parser.parse_args()
    try:
        args.lengths = [texts.parse_length(text) for text in args.lengths]
        args.settings = read_settings(args.settings)
    except ValueError as error:
        parser.error(str(error))
    return args


def read_settings(path: Path) -> list[settings.Setting]:
    """Reads settings as evaluate.py takes them, one a line; # begins a comment. Dense, against which all are compared,
    comes first, named or not.
    """
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return settings.parse_all([text_scores.DENSE, *filter(None, lines)])


class Servers:
    """A prefilld for each model folder, started when the first text needs it."""

    def __init__(self, args: argparse.Namespace, programs: live_processes.Programs):
        self._args, self._programs = args, programs
        self._clients: dict[Path, PrefillClient] = {}
        config = json.loads((args.model / "config.json").read_text())
        self._positions = config["max_position_embeddings"]

    def client(self, length: int) -> PrefillClient:
        """Raises ValueError when no model takes so many tokens."""
        folder = self._args.model if length <= self._positions else self._args.stretched
        if folder is None:
            raise ValueError(f"{length} tokens are more than the model's {self._positions}; --stretched is not given")
        if folder not in self._clients:
            flags = [f"--device={self._args.device}", f"--allowed_policies={','.join(contract.policies())}"]
            if self._args.clusters:
                flags.append(f"--clusters={self._args.clusters}")
            address = self._programs.start(self._args.prefilld, folder, "--metrics_listen=", *flags)
            self._clients[folder] = PrefillClient(address)
        return self._clients[folder]


def ask(client: PrefillClient, ids: list[int], setting: settings.Setting, timeout: float):
    """Returns the PrefillResult of one text. No cache is sent."""
    no_cache = Layout(BLOCK_TOKENS, first_block=-(-len(ids) // BLOCK_TOKENS))
    with client.prefill(
        ids, layout=no_cache, attention=Attention(**setting.fields()), prompt_logprobs=True, timeout=timeout
    ) as stream:
        for _ in stream:
            pass
        return stream.result


def record_of(setting: settings.Setting, index: int, kind: str, ids: list[int], result) -> dict:
    return {
        "setting": setting.name,
        "task": text_scores.TASK,
        "length": len(ids),
        "index": index,
        "kind": kind,
        "policy": enum_name("AttentionPolicy", result.policy),
        "density": result.total.density,
        **texts.nats_by_sort(ids, -np.array(result.prompt_logprobs)),  # entry i is of token i + 1
        "next_token": result.first_token.token_id,
        "compute_us": result.compute_us,
        "attention_us": result.total.attention_us,
        "pattern_us": result.total.pattern_us,
    }


class Run:
    """Measures cell by cell. A setting that the server refuses is left out, and the summary says why."""

    def __init__(self, args: argparse.Namespace, judged: texts.Texts, servers: Servers, journal: Journal):
        self._args, self._texts, self._servers, self._journal = args, judged, servers, journal
        self._end = time.monotonic() + args.seconds
        self.refused: dict[str, str] = {}

    def cell(self, setting: settings.Setting, length: int, count: int) -> bool:
        """Measures one setting on texts of one length. Returns false when the time is up."""
        client = self._servers.client(length)
        missing = [i for i in range(count) if not self._journal.has((setting.name, text_scores.TASK, length, i))]

        def one(index: int) -> dict | None:
            if time.monotonic() > self._end or setting.name in self.refused:
                return None
            ids = self._texts.ids(index, length)
            try:
                result = ask(client, ids, setting, self._args.timeout)
            except PrefilldError as error:
                if error.code not in REFUSALS:
                    raise
                self.refused[setting.name] = str(error)
                return None
            return record_of(setting, index, self._texts.about[index]["kind"], ids, result)

        with ThreadPoolExecutor(self._args.concurrency) as pool:
            for record in filter(None, pool.map(one, missing)):
                self._journal.add(record)
        return time.monotonic() <= self._end


def measure(args: argparse.Namespace, programs: live_processes.Programs) -> None:
    judged = texts.load(args.texts, args.role)
    args.lengths = [(length, min(count, len(judged.about))) for length, count in args.lengths]
    servers = Servers(args, programs)
    info = servers.client(args.lengths[0][0]).server_info()
    subject = {"model": args.model.name, "device": info.device, "server_version": info.version,
               "texts": args.role, "texts_digest": judged.digest}  # fmt: skip
    journal = Journal(args.out, subject)
    run = Run(args, judged, servers, journal)
    for setting in args.settings:
        begin = time.monotonic()
        in_time = all(run.cell(setting, length, count) for length, count in args.lengths)
        text_scores.write_summary(
            args.out, {**subject, "refused": run.refused}, journal.records, [s.name for s in args.settings]
        )
        print(f"{setting.name}: {run.refused.get(setting.name, f'{time.monotonic() - begin:.1f} s')}", flush=True)
        if not in_time:
            print(f"{args.seconds:.0f} s are over; the same command goes on", file=sys.stderr)
            break
    print((args.out / "table.txt").read_text())


def main() -> int:
    args = read_arguments()
    try:
        with live_processes.Programs() as programs:
            measure(args, programs)
    except (PrefilldError, ValueError, RuntimeError, OSError) as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
