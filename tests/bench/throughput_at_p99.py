#!/usr/bin/env python3
"""Compares the rules of --scheduling: how much more of a trace does prefilld take under turns than under first come,
first served, before its p99 of the time to the first token is as long?

    PYTHONPATH=client/python tests/bench/throughput_at_p99.py BIN_DIR MODEL --trace=trace.csv --server_flags=--device=cuda

First all requests come at once, which says how fast the device gets through them; that is load 1. Then they come
at --load of that under fifo, and the p99 of that run is the mark. Then turns gets ever more, until its p99 passes
the mark; the share of the two loads is the answer. The p99 is that of all requests, in which the longest prompts
have the say, or with --length of those of one group of lengths; all of them are printed beside it. No KV is asked
for. Above load 1 the queue grows until the trace ends, so an answer there holds for a trace of this length alone.
--profile=FILE asks prefill-simulator instead of a server, in seconds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import compare_simulator
from first_tokens import NEVER, percentile_of_report, refused_of_report, shown

Run = Callable[[str, float], dict]  # scheduling, speedup: the report


def of_simulator(args: argparse.Namespace) -> Run:
    def run(scheduling: str, speedup: float) -> dict:
        return compare_simulator.run_json(
            [args.bin_dir / "prefill-simulator", f"--profile={args.profile}", f"--trace={args.trace}", "--json",
             f"--policy={args.policy}", f"--scheduling={scheduling}", f"--speedup={speedup}",
             "--queue_capacity=1000000", "--max_queued_tokens=10000000000"]  # fmt: skip
        )

    return run


def of_server(args: argparse.Namespace) -> Run:
    def run(scheduling: str, speedup: float) -> dict:
        flags = ["--queue_capacity=1000000", "--max_queued_tokens=10000000000", f"--scheduling={scheduling}"]
        with compare_simulator.running_server(args.bin_dir, args.model, [*flags, *args.server_flags]) as address:
            bench = [args.bin_dir / "prefill-cli", "bench", f"--server={address}", "--quiet", "--json",
                     f"--policy={args.policy}", "--last_blocks=0", "--max_in_flight=65536", "--lanes=16"]  # fmt: skip
            compare_simulator.run_json([*bench, f"--trace={args.trace}", "--num_requests=20", "--seed=1"])  # warms up
            return compare_simulator.run_json([*bench, f"--trace={args.trace}", f"--speedup={speedup}"])

    return run


def p99(report: dict, length: str) -> float:
    return percentile_of_report(report["by_length"][length] if length else report, 0.99)


def summary(report: dict, load: float) -> dict:
    return {
        "load": round(load, 3),
        "tokens_per_s": report["done"]["tokens_per_s"],
        "ends": report["ends"],
        "refused": refused_of_report(report),
        "p99_ms": shown(percentile_of_report(report, 0.99)),
        "answered_first_token_ms": report["first_token_ms"],
        "p99_by_length_ms": {
            name: shown(percentile_of_report(group, 0.99)) for name, group in report["by_length"].items()
        },
        "sent_late_p99_ms": report["sender"]["late_ms"].get("p99"),
    }


def search(run: Run, load: float, length: str, steps: int, note: Callable[[str], None]) -> dict:
    """Returns both ends of the comparison. A load is a share of what the device gets through."""
    at_once = run("fifo", 1e6)
    offered = run("fifo", 1.0)["offered"]["tokens_per_s"]
    full = at_once["done"]["tokens_per_s"] / offered  # the speedup of load 1
    note(f"load 1 is {at_once['done']['tokens_per_s']:.0f} tokens/s, {full:.2f} times the trace")
    fifo = run("fifo", load * full)
    mark = p99(fifo, length)
    if mark == NEVER:
        raise SystemExit(f"fifo left {refused_of_report(fifo)} of {fifo['requests']} without an answer: there is no p99")
    note(f"fifo at load {load}: p99 {mark:.0f} ms")
    # Turns holds the mark at `low` and does not at `high`.
    low, high, best = 0.0, 2.0, None
    for _ in range(steps):
        tried = load if best is None and low == 0.0 and high == 2.0 else (low + high) / 2
        report = run("turns", tried * full)
        note(f"turns at load {tried:.3f}: p99 {p99(report, length):.0f} ms")
        if p99(report, length) <= mark:
            low, best = tried, report
        else:
            high = tried
    result = {"fifo": summary(fifo, load), "turns": summary(best, low) if best else None}
    result["throughput_of_turns"] = round(low / load, 3) if best else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin_dir", type=Path, help="the build's folder of programs")
    parser.add_argument("model", help="model folder; unused with --profile")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--profile", help="of measure_layers.py: asks the simulator")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--length", default="", help='for instance "up to 1024"; empty: all requests')
    parser.add_argument("--steps", type=int, default=6, help="runs under turns")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--server_flags", nargs="*", default=[])
    args = parser.parse_args()
    run = of_simulator(args) if args.profile else of_server(args)
    result = search(run, args.load, args.length, args.steps, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
