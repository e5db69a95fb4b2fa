#!/usr/bin/env python3
"""Measures a running prefilld for prefill-simulator and prints the profile that it needs.

    PYTHONPATH=client/python tests/bench/measure_layers.py localhost:50051 >profile.json

Random prompts of doubling lengths are computed one by one while nobody else asks the server. Of each length the
median of --repeats counts. Prompts a little shorter, of lengths that the server has hardly seen before, tell what the
first layer takes then. Places for prompts, batches and the parts of layers are those of a server that was
started without flags about them, by its device; edit the file if yours had some.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator

from prefilld import Attention, Layout, PrefillClient, wire

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
CACHE_BLOCK_TOKENS = 128
LONG = 65536  # from here on lengths that are new are measured once


def lengths(shortest: int, longest: int) -> Iterator[int]:
    length = shortest
    while length < longest:
        yield length
        length *= 2
    yield longest


def measure(client: PrefillClient, tokens: list[int], policy: str) -> dict[str, float]:
    """Computes one prompt and returns its times in microseconds. No KV is asked for."""
    layout = Layout(block_tokens=128, first_block=-(-len(tokens) // 128))
    begin = time.perf_counter()
    with client.prefill(
        tokens, layout=layout, attention=Attention(policy), layer_stats=True, bypass_prefix_cache=True
    ) as stream:
        list(stream)
    took_us = 1e6 * (time.perf_counter() - begin)
    result = stream.result
    layers = [layer.compute_us for layer in result.layers]
    return {
        "layer_us": statistics.mean(layers[:-1]) if layers[:-1] else layers[-1],
        "first_use_us": max(0.0, layers[0] - statistics.mean(layers[1:-1])) if layers[1:-1] else 0.0,
        "last_layer_us": layers[-1],
        "first_token_us": max(0, result.compute_us - sum(layers)),
        "request_us": max(0.0, took_us - result.compute_us),
    }


def first_use_us(client: PrefillClient, length: int, policy: str, repeats: int, vocab_size: int) -> float:
    """Returns what the first layer takes beside its work when no prompt before had the length."""
    rng = random.Random()  # with a seed of its own a second measurement would find the lengths known
    runs = []
    for _ in range(repeats if length < LONG else 1):
        unseen = max(1, length - rng.randrange(1, max(2, length // 8)))
        runs.append(measure(client, rng.choices(range(vocab_size), k=unseen), policy)["first_use_us"])
    return statistics.median(runs)


def places(device: str, max_tokens: int) -> list[int]:
    if device == "cpu":
        return [max_tokens] + 2 * [min(4096, max_tokens)]
    return 2 * [max_tokens] + 2 * [min(131072, max_tokens)] + 4 * [min(8192, max_tokens)]


def profile(client: PrefillClient, policies: list[str], shortest: int, longest: int, repeats: int) -> dict:
    info = client.server_info()
    longest = min(longest or info.max_prompt_tokens, info.max_prompt_tokens)
    rng = random.Random(1)
    vocab_size = min(256, info.vocab_size)
    prompts, request_us = [], []
    for policy in policies:
        for length in lengths(shortest, longest):
            if policy != "dense" and length <= 256:
                continue  # a prompt of two blocks of patterns is dense under every policy
            runs = []
            for _ in range(repeats + 1):  # the first one warms up
                runs.append(measure(client, rng.choices(range(vocab_size), k=length), policy))
            times = {name: round(statistics.median(run[name] for run in runs[1:]), 1) for name in runs[0]}
            request_us.append(times.pop("request_us"))
            # The mean of the layers holds what the first layer of a known length takes beside its work.
            unseen = first_use_us(client, length, policy, repeats, vocab_size) - times.pop("first_use_us")
            times["first_layer_us"] = round(times["layer_us"] + max(0.0, unseen), 1)
            prompts.append({"policy": policy, "num_tokens": length, **times})
    dtype = wire.enum_name("DType", info.native_dtype)
    on_cpu = info.device == "cpu"
    return {
        "device": info.device,
        "model": info.model_name,
        "num_layers": info.num_layers,
        "max_tokens": info.max_prompt_tokens,
        "crossover_tokens": info.crossover_tokens,
        "cache_block_bytes": 2 * info.num_layers * info.num_kv_heads * info.head_dim * CACHE_BLOCK_TOKENS * BYTES[dtype],
        "places": places(info.device, info.max_prompt_tokens),
        "max_batch_tokens": 0 if on_cpu else 2048,
        "interject_tokens": min(4096, info.max_prompt_tokens),
        "part_tokens": 2048 if on_cpu else 8192,
        "attention_part_us": 100_000 if on_cpu else 30_000,
        "queues_ahead": not on_cpu,
        "request_us": statistics.median(request_us),
        "prompts": prompts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", help="host:port")
    parser.add_argument("--policies", nargs="+", default=["dense", "share"])
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=0, help="0: the server's longest prompt")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with PrefillClient(args.server) as client:
        print(json.dumps(profile(client, args.policies, args.shortest, args.longest, args.repeats), indent=1))


if __name__ == "__main__":
    main()
