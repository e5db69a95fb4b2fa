#!/usr/bin/env python3
"""Measures how long short prompts wait for their first token, alone and beside two clients that send long ones.

    PYTHONPATH=client/python tests/bench/short_beside_long.py PREFILLD MODEL --device=cuda --seconds=25 \\
        --long_prompts long1.json long2.json

Dense prompts of --short_tokens random tokens come together, --per_second times a second on average. The long
prompts are files of token ids, for instance of model/synthetic/make_checkpoint.py --prompt; without any,
random tokens are sent. Only the last block of KV is asked for, so that consumers wait for nothing but the
computation. The times are those of the server's log (ttft_ms), queueing included. Prompts that were refused are counted,
and stand behind all others (first_tokens.py).
"""

import argparse
import contextlib
import json
import random
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from first_tokens import first_token_times

from prefilld import Attention, Layout, PrefillClient, PrefilldError


@contextlib.contextmanager
def running_server(program: str, flags: list[str]) -> Iterator[tuple[str, Path]]:
    """Starts prefilld on a free port, waits until it is ready, and yields its address and its log."""
    with tempfile.TemporaryDirectory() as folder:
        ports, log = Path(folder, "ports"), Path(folder, "log")
        with log.open("w") as stderr:
            server = subprocess.Popen(
                [program, "--listen=127.0.0.1:0", "--metrics_listen=", f"--port_file={ports}", *flags], stderr=stderr)
        try:
            while not ports.exists():
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            yield f"127.0.0.1:{re.search(r'grpc=([0-9]+)', ports.read_text())[1]}", log
        finally:
            server.terminate()
            server.wait()


def prefill(client: PrefillClient, tokens: list[int], policy: str, metadata=()):
    layout = Layout(block_tokens=64, first_block=(len(tokens) - 1) // 64)
    with client.prefill(tokens, layout=layout, attention=Attention(policy), metadata=metadata) as stream:
        for _ in stream:
            pass
        return stream.result


class Sender:
    """Sends prompts, and counts by their length those that were refused or failed. For several threads."""

    def __init__(self):
        self._refused: Counter[int] = Counter()
        self._failure: Exception | None = None  # the first that no other try would have mended
        self._lock = threading.Lock()

    def send(self, client: PrefillClient, tokens: list[int], policy: str, metadata=()) -> float:
        """Returns the seconds that a refusal asks to wait, and 0 after an answer."""
        try:
            prefill(client, tokens, policy, metadata)
            return 0.0
        except Exception as error:  # of any kind: an exception would end the thread, and nothing else
            is_refusal = isinstance(error, PrefilldError) and error.retryable
            with self._lock:
                self._refused[len(tokens)] += 1
                if not is_refusal and self._failure is None:
                    self._failure = error
            return (error.retry_after if is_refusal else None) or 0.1

    def refused(self) -> Counter[int]:
        """Returns the counts. Ends the program if a prompt failed for another reason than the server's load."""
        if self._failure is not None:
            raise SystemExit(f"a prompt failed: {self._failure}")
        return self._refused


def send_shorts(args: argparse.Namespace, address: str, prompts: dict[int, list[list[int]]], seconds: float,
                rng: random.Random) -> Counter[int]:  # fmt: skip
    """Sends short prompts, each from a thread and a connection of its own, and waits for all. Returns the refused ones."""
    threads, sender = [], Sender()
    end = time.monotonic() + seconds

    def send(tokens: list[int]) -> None:
        with PrefillClient(address) as client:
            sender.send(client, tokens, "dense")

    while time.monotonic() < end:
        for length in args.short_tokens:
            threads.append(threading.Thread(target=send, args=(rng.choice(prompts[length]),)))
            threads[-1].start()
        time.sleep(rng.expovariate(args.per_second))
    for thread in threads:
        thread.join()
    return sender.refused()


def measure(args: argparse.Namespace, address: str, log: Path) -> dict:
    rng = random.Random(7)
    random_prompt = lambda length: [rng.randrange(args.vocabulary) for _ in range(length)]  # noqa: E731
    shorts = {length: [random_prompt(length) for _ in range(8)] for length in args.short_tokens}
    longs = [json.loads(Path(path).read_text()) for path in args.long_prompts]
    longs = longs or [random_prompt(args.long_tokens) for _ in range(2)]

    def phase(run) -> dict[str, dict]:
        begin = log.stat().st_size
        refused = run()
        time.sleep(0.5)
        return first_token_times(log.read_bytes()[begin:].decode(), refused)

    def long_alone() -> Counter[int]:
        for tokens in longs:
            prefill(PrefillClient(address), tokens, args.policy)
        return Counter()

    def beside() -> Counter[int]:
        stop, sender = threading.Event(), Sender()

        def keep_sending(tokens: list[int]) -> None:
            with PrefillClient(address) as client:
                while not stop.is_set():
                    stop.wait(sender.send(client, tokens, args.policy))

        threads = [threading.Thread(target=keep_sending, args=(tokens,)) for tokens in longs]
        for thread in threads:
            thread.start()
        time.sleep(1)
        refused = send_shorts(args, address, shorts, args.seconds, rng)
        stop.set()
        for thread in threads:
            thread.join()
        return refused + sender.refused()

    send_shorts(args, address, shorts, 1, rng)  # warms up
    return {
        "alone_ms": phase(lambda: send_shorts(args, address, shorts, args.seconds / 4, rng)),
        "long_alone_ms": phase(long_alone),
        "beside_ms": phase(beside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefilld", help="the server program")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--short_tokens", type=int, nargs="+", default=[512, 2048], help="of the short prompts")
    parser.add_argument("--per_second", type=float, default=3.0, help="how often short prompts come")
    parser.add_argument("--policy", default="share", help="of the long prompts")
    parser.add_argument("--long_prompts", nargs="*", default=[], metavar="JSON")
    parser.add_argument("--long_tokens", type=int, default=131072, help="of random long prompts")
    parser.add_argument("--vocabulary", type=int, default=256, help="token ids are drawn below it")
    args = parser.parse_args()
    flags = [f"--model={args.model}", f"--device={args.device}", f"--max_prompt_tokens={args.long_tokens}"]
    with running_server(args.prefilld, flags) as (address, log):
        print(json.dumps(measure(args, address, log), indent=1))


if __name__ == "__main__":
    main()
