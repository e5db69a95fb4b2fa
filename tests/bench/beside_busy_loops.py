#!/usr/bin/env python3
"""Measures how much longer a prompt takes on the CPU while other processes want the cores.

    PYTHONPATH=client/python tests/bench/beside_busy_loops.py PREFILLD MODEL --loops 2 12

Each of the other processes counts without a pause. With as many of them as cores, a fair share is half of
every core, and so twice the time. The phases take turns, and the medians of their times to the first token
count. OMP_WAIT_POLICY and GOMP_SPINCOUNT in the environment reach the server.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator

from prefilld import PrefillClient
from short_beside_long import prefill, running_server


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefilld", help="the server program")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--loops", type=int, nargs="*", default=[os.cpu_count()], help="busy processes")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--policy", default="share")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(7)
    prompt = [rng.randrange(256) for _ in range(args.tokens)]
    with running_server(args.prefilld, [f"--model={args.model}", "--device=cpu"]) as (address, _):
        with PrefillClient(address) as client:
            prefill(client, prompt, args.policy)  # warms up
            times: dict[int, list[float]] = {count: [] for count in [0, *args.loops]}
            for _ in range(args.runs):
                for count, of_count in times.items():
                    with busy_loops(count):
                        result = prefill(client, prompt, args.policy)
                    of_count.append(1e-3 * result.compute_us)
    medians = {count: statistics.median(of_count) for count, of_count in times.items()}
    print(json.dumps({
        "alone_ms": round(medians[0], 1),
        **{f"beside_{n}": {"ms": round(medians[n], 1), "times_alone": round(medians[n] / medians[0], 2)}
           for n in args.loops},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
