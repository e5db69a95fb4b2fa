#!/usr/bin/env python3
"""Measures the time to the first token of a long prompt: cold, nine tenths of it cached, and all but its end.

    PYTHONPATH=client/python tests/bench/cached_prefix.py PREFILLD MODEL --device=cuda --tokens=65536 \\
        --prompts long1.json long2.json

Each file holds token ids, of which the first --tokens are used. The times are those of the server's log (ttft_ms).
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from prefilld import PrefillClient
from short_beside_long import prefill, running_server


def last_time(log: Path) -> float:
    """Returns ttft_ms of the latest request in the log."""
    return float(re.findall(r" ttft_ms=([\d.]+)", log.read_text())[-1])


def measure(client: PrefillClient, log: Path, tokens: list[int], policy: str) -> dict:
    def first_token(prompt: list[int]) -> tuple[float, int, int]:
        result = prefill(client, prompt, policy)
        return last_time(log), result.cached_tokens, result.first_token.token_id

    # A first token of its own makes a prompt share nothing with those before.
    warm_up = [tokens[1], *tokens[1:]]
    first_token(warm_up)
    cold, _, token = first_token(tokens)
    whole, whole_cached, again = first_token(tokens)
    kept = len(tokens) * 9 // 10
    part, part_cached, _ = first_token(tokens[:kept] + tokens[: len(tokens) - kept])
    return {
        "cold_ms": cold,
        "part_cached": part_cached / len(tokens),
        "part_ms": part,
        "whole_cached": whole_cached / len(tokens),
        "whole_ms": whole,
        "same_token": token == again,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefilld", help="the server program")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="JSON")
    parser.add_argument("--cache_bytes", type=int, default=16 << 30)
    args = parser.parse_args()
    prompts = [json.loads(Path(path).read_text())[: args.tokens] for path in args.prompts]
    report = {}
    for policy in ("dense", "share"):
        flags = [f"--model={args.model}", f"--device={args.device}", f"--max_prompt_tokens={args.tokens}",
                 f"--prefix_cache_bytes={args.cache_bytes}"]  # fmt: skip
        with running_server(args.prefilld, flags) as (address, log), PrefillClient(address) as client:
            rows = [measure(client, log, tokens, policy) for tokens in prompts]
        of_cold = lambda name, rows=rows: round(statistics.median(row[name] / row["cold_ms"] for row in rows), 3)  # noqa: E731
        report[policy] = {"part_of_cold": of_cold("part_ms"), "whole_of_cold": of_cold("whole_ms"), "prompts": rows}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
