#!/usr/bin/env python3
"""Makes a trace for `prefill-cli bench` and for prefill-simulator, with lengths like those of published workloads.

    tests/bench/make_trace.py --mix=mixed --requests=2000 --rate=4 --seed=1 >trace.csv

A mix is drawn from a summary of a published trace and is no copy of it: from the percentiles below of its
prompt lengths, between which the logarithm of the length is taken to be even. Arrivals are a Poisson process.

azure_code, azure_conversation: two services of Azure in November 2023, 8,819 and 19,366 requests. Splitwise,
    arXiv 2311.18677; github.com/Azure/AzurePublicDataset at b469a11, data/AzureLLMInferenceTrace_{code,conv}.csv.
mooncake_conversation: a service of Moonshot AI, 12,031 requests. Mooncake, arXiv 2407.00079;
    github.com/kvcache-ai/Mooncake at 3b5a594, FAST25-release/traces/conversation_trace.jsonl. There half of the
    requests share no more than the first 512 tokens with an earlier one, and 37 % of all tokens are shared. So
    half of ours go on with a conversation, whose latest prompt is all of their beginning: the longest of twelve
    drawn among the open ones that are shorter, which shares 35 to 37 % of the tokens. Nothing is known about
    what Azure's requests share.
mixed: a third of each.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator

PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
LENGTHS = {
    "azure_code": (3, 17, 75, 147, 578, 1469, 2745, 5194, 7315, 7436, 7437),
    "azure_conversation": (2, 29, 181, 207, 396, 1020, 1189, 2735, 4083, 4142, 14050),
    "mooncake_conversation": (891, 894, 901, 964, 2306, 6909, 15368, 27367, 39552, 85401, 126195),
}
MIXES = {name: (name,) for name in LENGTHS} | {"mixed": tuple(LENGTHS)}
CONTINUED = {"mooncake_conversation": 0.5}  # the share of requests that go on with a conversation
OPEN_CONVERSATIONS = 64
LONGEST_OF = 12  # conversations


def draw_length(source: str, rng: random.Random) -> float:
    """Returns a length whose percentile is even between the ones that are known."""
    percentile = 100 * rng.random()
    above = next(i for i, bound in enumerate(PERCENTILES) if percentile < bound)
    low, high = (math.log(length) for length in LENGTHS[source][above - 1 : above + 1])
    share = (percentile - PERCENTILES[above - 1]) / (PERCENTILES[above] - PERCENTILES[above - 1])
    return math.exp(low + share * (high - low))


class Conversations:
    """The conversations that a later request may go on with, by the length of their latest turns."""

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}
        self._begun = 0

    def assign(self, tokens: int, goes_on: bool, rng: random.Random) -> str:
        """Returns the name of the conversation of which a prompt of so many tokens is a turn."""
        shorter = [name for name, length in self._lengths.items() if length < tokens]
        if goes_on and shorter:
            name = max(rng.choices(shorter, k=LONGEST_OF), key=self._lengths.__getitem__)
        else:
            self._begun += 1
            name = f"conversation-{self._begun}"
        self._lengths.pop(name, None)
        self._lengths[name] = tokens  # as the latest one
        if len(self._lengths) > OPEN_CONVERSATIONS:
            self._lengths.pop(next(iter(self._lengths)))
        return name


def rows(args: argparse.Namespace) -> Iterator[tuple[float, int, str, int, str]]:
    """Yields arrival_s, tokens, prefix, prefix_tokens and tenant of each request."""
    rng = random.Random(args.seed)
    conversations = Conversations()
    arrival = 0.0
    for _ in range(args.requests):
        arrival += rng.expovariate(args.rate)
        source = rng.choice(MIXES[args.mix])
        tokens = round(args.scale * draw_length(source, rng))
        tokens = max(1, min(args.max_tokens, tokens))
        tenant = rng.choice(args.tenants) if args.tenants else ""
        prefix = ""
        if source in CONTINUED:
            prefix = conversations.assign(tokens, rng.random() < CONTINUED[source], rng)
        yield arrival, tokens, prefix, tokens if prefix else 0, tenant


def write_trace(args: argparse.Namespace, out) -> None:
    shown = " ".join(f"--{name}={value}" for name, value in vars(args).items() if name != "tenants")
    shown += f" --tenants {' '.join(args.tenants)}" if args.tenants else ""
    out.write(f"# tests/bench/make_trace.py {shown}\n")
    out.write("# Drawn from percentiles of the traces of arXiv 2311.18677 and 2407.00079; see there.\n")
    out.write("arrival_s,tokens,prefix,prefix_tokens,tenant\n")
    for arrival, tokens, prefix, prefix_tokens, tenant in rows(args):
        out.write(f"{arrival:.4f},{tokens},{prefix},{prefix_tokens or ''},{tenant}\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mix", choices=sorted(MIXES), default="mixed")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--scale", type=float, default=1.0, help="lengths are multiplied by it, for small models")
    parser.add_argument("--max_tokens", type=int, default=131072, help="longer prompts are cut to it")
    parser.add_argument("--tenants", nargs="*", default=[], help="names among which requests are divided evenly")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.requests < 1 or not args.rate > 0 or not args.scale > 0 or args.max_tokens < 1:
        parser.error("--requests, --rate, --scale and --max_tokens must be positive")
    return args


if __name__ == "__main__":
    write_trace(parse(), sys.stdout)
