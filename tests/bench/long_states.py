#!/usr/bin/env python3
"""Measures memory, and short prompts, while several very long prompts are under way on a GPU.

    PYTHONPATH=client/python:tests/bench tests/bench/long_states.py PREFILLD MODEL --tokens=1000000 --seconds=60

The server has states for --prompts prompts of --tokens random tokens at once. They are sent together, short prompts come
beside them for --seconds, and then the long ones are cancelled. Device memory is that of the whole card, as nvidia-smi
tells; the card should do nothing else.
"""

import argparse
import json
import random
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

from first_tokens import first_token_times
from short_beside_long import running_server, send_shorts

from prefilld import Attention, Layout, PrefillClient


def device_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0])


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        return next(float(line.split()[1]) for line in page.read().decode().splitlines() if line.startswith(name + " "))


class Memory:
    """The most memory of the card that was in use since the start, looked at ten times a second."""

    def __init__(self):
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.most = max(self.most, device_mib())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def measure(args: argparse.Namespace, address: str, log: Path, before: int) -> dict:
    rng = random.Random(7)
    random_prompt = lambda length: [rng.randrange(args.vocabulary) for _ in range(length)]  # noqa: E731
    shorts = {length: [random_prompt(length) for _ in range(8)] for length in args.short_tokens}
    send_shorts(args, address, shorts, 1, rng)  # warms up
    ready = device_mib() - before
    memory, client = Memory(), PrefillClient(address)
    layout = Layout(block_tokens=64, first_block=(args.tokens - 1) // 64)
    streams = []
    for priority in range(-args.prompts, 0):  # each goes before those that have begun, and takes a state of its own
        streams.append(client.submit(random_prompt(args.tokens), layout=layout, attention=Attention(args.policy),
                                     priority=priority))  # fmt: skip
        deadline = time.monotonic() + 60
        while (resident := metric(args.metrics_port, "prefilld_resident_tokens")) < len(streams) * args.tokens:
            if time.monotonic() > deadline:
                raise SystemExit(f"only {resident} tokens are under way")
            time.sleep(0.1)
    begin = log.stat().st_size
    refused = send_shorts(args, address, shorts, args.seconds, rng)
    time.sleep(0.5)
    result = {
        "resident_tokens": resident,
        "resident_tokens_limit": metric(args.metrics_port, "prefilld_resident_tokens_limit"),
        "steps": metric(args.metrics_port, "prefilld_steps_total"),
        "device_mib_ready": ready,
        "device_mib_most": memory.most - before,
        "short_beside_ms": first_token_times(log.read_bytes()[begin:].decode(), refused),
    }
    memory.stop()
    for stream in streams:
        stream.cancel()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefilld", help="the server program")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--policy", default="share")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--short_tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--per_second", type=float, default=3.0, help="how often short prompts come")
    parser.add_argument("--vocabulary", type=int, default=256, help="token ids are drawn below it")
    parser.add_argument("--metrics_port", type=int, default=19464)
    args = parser.parse_args()
    resident = args.prompts * args.tokens + 65536  # and some short ones
    flags = [f"--model={args.model}", f"--device={args.device}", f"--max_prompt_tokens={args.tokens}",
             f"--max_resident_tokens={resident}", f"--metrics_listen=127.0.0.1:{args.metrics_port}"]
    before = device_mib()
    with running_server(args.prefilld, flags) as (address, log):
        result = measure(args, address, log, before)
        print(json.dumps({"tokens": args.tokens, "prompts": args.prompts, "policy": args.policy, **result}, indent=1))


if __name__ == "__main__":
    main()
