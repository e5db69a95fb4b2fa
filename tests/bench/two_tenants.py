#!/usr/bin/env python3
"""Measures what one tenant waits for its first tokens, alone and while another tenant of equal weight floods the server.

    PYTHONPATH=client/python:tests/bench tests/bench/two_tenants.py PREFILLD MODEL --device=cuda

The visitor sends prompts of --tokens random tokens one after another. The flood are --callers that do the same, each
again as soon as it has its answer or, if it is refused, after the delay that the refusal names. With half of the device
for itself the visitor would need twice what it needs alone. The times are those of the server's log (ttft_ms),
queueing included. Each refusal counts as a prompt that stands behind all others (first_tokens.py).
"""

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path

from first_tokens import first_token_times
from short_beside_long import Sender, prefill, running_server

from prefilld import PrefillClient


class Tenant:
    """Callers of one tenant, each of which sends its prompt again and again until stop()."""

    def __init__(self, name: str, address: str, prompts: list[list[int]], policy: str):
        self.name = name
        self._stop = threading.Event()
        self._sender = Sender()
        self._threads = [threading.Thread(target=self._call, args=(address, prompt, policy)) for prompt in prompts]
        for thread in self._threads:
            thread.start()

    def _call(self, address: str, prompt: list[int], policy: str) -> None:
        with PrefillClient(address) as client:
            while not self._stop.is_set():
                self._stop.wait(self._sender.send(client, prompt, policy, metadata=(("x-tenant", self.name),)))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def times(self, log: Path, begin: int) -> dict:
        """Returns its percentiles since `begin` in the log. After stop()."""
        lines = log.read_bytes()[begin:].decode().splitlines()
        own = "\n".join(line for line in lines if f" tenant={self.name} " in line + " ")
        return first_token_times(own, self._sender.refused())


def measure(args: argparse.Namespace, address: str, log: Path) -> dict:
    rng = random.Random(7)
    prompts = [[rng.randrange(args.vocabulary) for _ in range(args.tokens)] for _ in range(args.callers + 1)]
    visitor, flood = prompts[:1], prompts[1:]

    def visit() -> dict:
        begin = log.stat().st_size
        tenant = Tenant("visitor", address, visitor, args.policy)
        time.sleep(args.seconds)
        tenant.stop()
        time.sleep(0.5)
        return tenant.times(log, begin)

    prefill(PrefillClient(address), visitor[0], args.policy)  # warms up
    alone = visit()
    begin = log.stat().st_size
    flooding = Tenant("flood", address, flood, args.policy)
    time.sleep(args.seconds / 4)
    flooded = visit()
    flooding.stop()
    time.sleep(0.5)
    return {"alone_ms": alone, "flooded_ms": flooded, "flood_ms": flooding.times(log, begin)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefilld", help="the server program")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=15, help="of each of the two measurements")
    parser.add_argument("--callers", type=int, default=80, help="of the flood")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--policy", default="dense")
    parser.add_argument("--vocabulary", type=int, default=256, help="token ids are drawn below it")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as tenants:
        json.dump({"tenants": [{"name": "visitor"}, {"name": "flood"}]}, tenants)
        tenants.flush()
        flags = [f"--model={args.model}", f"--device={args.device}", f"--max_prompt_tokens={max(args.tokens, 8192)}",
                 f"--tenants={tenants.name}", "--tenant_from=metadata"]
        with running_server(args.prefilld, flags) as (address, log):
            print(json.dumps(measure(args, address, log), indent=1))


if __name__ == "__main__":
    main()
