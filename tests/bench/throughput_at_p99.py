#!/usr/bin/env python3
"""Compares the rules of --scheduling: how much more load does prefilld take under turns than under first come, first
served, for the same p99 of the time to the first token?

    PYTHONPATH=client/python tests/bench/throughput_at_p99.py BIN_DIR MODEL --profile=profile.json --traces a.csv b.csv

Load 1 keeps the device busy all the time: as many requests come as take the time that passes, one by one, by the
profile. They come at --load under turns, and at each of --fifo_loads under first come, first served. The load at which the latter has
the p99 of the former, and --load divided by it, is the answer: it is given for the p99 of all requests, of every group
of lengths, and of the stretch (equal_p99.py), and for other percentiles. The requests of all traces are judged together, because a p99 of one
short trace is the wait of one or two requests.

The other way round, with a p99 that first come, first served has at load 0.9, no rule could take more than 1 / 0.9
times the load: above load 1 the queue grows without end.

It asks prefill-simulator, in seconds. --server asks a server instead, with --server_flags, as many seconds as the
traces take; no KV is asked for.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import compare_simulator
from equal_p99 import Request, alone_ms, full_speedup, load_for, measures, requests_of
from first_tokens import shown

Run = Callable[[str, str, float], dict]  # trace, scheduling, speedup: the report
UNBOUNDED = ["--queue_capacity=1000000", "--max_queued_tokens=10000000000"]


def of_simulator(args: argparse.Namespace) -> Run:
    def run(trace: str, scheduling: str, speedup: float) -> dict:
        return compare_simulator.run_json(
            [args.bin_dir / "prefill-simulator", f"--profile={args.profile}", f"--trace={trace}", "--json", "--each",
             f"--policy={args.policy}", f"--scheduling={scheduling}", f"--speedup={speedup}", *UNBOUNDED])  # fmt: skip

    return run


def of_server(args: argparse.Namespace) -> Run:
    def run(trace: str, scheduling: str, speedup: float) -> dict:
        flags = [*UNBOUNDED, f"--scheduling={scheduling}", *args.server_flags]
        with compare_simulator.running_server(args.bin_dir, args.model, flags) as address:
            bench = [args.bin_dir / "prefill-cli", "bench", f"--server={address}", "--quiet", "--json", "--each",
                     f"--policy={args.policy}", "--last_blocks=0", "--max_in_flight=65536", "--lanes=16",
                     f"--trace={trace}"]  # fmt: skip
            compare_simulator.run_json([*bench, "--num_requests=20", "--seed=1"])  # warms up
            return compare_simulator.run_json([*bench, f"--speedup={speedup}"])

    return run


class Loads:
    """Sends all traces at a load."""

    def __init__(self, run: Run, traces: list[str], alone: Callable[[int], float]):
        self._run = run
        self._speedups = {trace: full_speedup(Path(trace).read_text(), alone) for trace in traces}

    def send(self, scheduling: str, load: float) -> list[Request]:
        requests = []
        for trace, speedup in self._speedups.items():
            report = self._run(trace, scheduling, load * speedup)
            late = report["sender"]["late_ms"].get("p99", 0)
            if late > 20:
                note(f"{trace}: requests were sent up to {late} ms late")
            requests += requests_of(report)
        return requests


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(loads: Loads, args: argparse.Namespace, alone: Callable[[int], float]) -> dict:
    turns = measures(loads.send("turns", args.load), alone)
    note(f"turns at load {args.load}: {turns}")
    fifo = {}
    for load in args.fifo_loads:
        fifo[load] = measures(loads.send("fifo", load), alone)
        note(f"fifo at load {load}: {fifo[load]}")
    answers = {}
    for name, mark in turns.items():
        load, side = load_for(mark, {tried: p99s.get(name, 0.0) for tried, p99s in fifo.items()})
        answers[name] = f"{dict(below='more than ', above='less than ').get(side, '')}{args.load / load:.2f}"
    table = {load: {name: shown(value) for name, value in p99s.items()} for load, p99s in fifo.items()}
    return {"load": args.load, "turns": {name: shown(value) for name, value in turns.items()},
            "fifo_by_load": table, "load_of_turns_by_fifos_for_the_same": answers}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin_dir", type=Path, help="the build's folder of programs")
    parser.add_argument("model", help="model folder; unused without --server")
    parser.add_argument("--traces", nargs="+", required=True)
    parser.add_argument("--profile", required=True, help="of measure_layers.py")
    parser.add_argument("--load", type=float, default=0.9, help="under turns")
    parser.add_argument("--fifo_loads", type=float, nargs="+", default=[round(0.1 * i, 1) for i in range(1, 10)])
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--server", action="store_true", help="ask a server")
    parser.add_argument("--server_flags", nargs="*", default=[])
    args = parser.parse_args()
    alone = alone_ms(json.loads(Path(args.profile).read_text()), args.policy)
    loads = Loads(of_server(args) if args.server else of_simulator(args), args.traces, alone)
    print(json.dumps(compare(loads, args, alone), indent=1))


if __name__ == "__main__":
    main()
