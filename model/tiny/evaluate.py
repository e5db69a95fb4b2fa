#!/usr/bin/env python3
"""Scores the embedded model under dense attention: retrieval by length and depth, text loss by position, samples.

evaluate.py --model FOLDER --text DOCS SOURCES --out evaluation.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F

import corpus
import tasks
from decoder import Decoder

OPENINGS = [
    "The Python interpreter is ",
    "This module provides a simple interface for ",
    "A hacker is a person who ",
    "def read_lines(path):\n    ",
    "The old fisher ",
]


def examples(task: str, length: int, count: int, text: corpus.Corpus, seed: int = 1) -> list[tasks.Example]:
    """Makes examples with depths spread evenly over the prompt. Sentences and held-out text are the filler in turn."""
    rng = random.Random(f"{seed} {task} {length}")
    fillers = (tasks.sentence_filler, text.filler)
    return [tasks.make(task, rng, length, fillers[i % 2], (i + 0.5) / count) for i in range(count)]


@torch.no_grad()
def right_answers(model: Decoder, prompts: list[tasks.Example], tokens_per_batch: int) -> list[bool]:
    """Tells whether greedy decoding gives the answer: with the answer fed in, each of its bytes must be the likeliest.
    """
    size = max(1, tokens_per_batch // len(prompts[0].prompt))
    right = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        count = len(part[0].answer)
        ids = torch.tensor([tasks.encode(e.prompt + e.answer)[:-1] for e in part], device=model.embedding.device)
        predicted = model.logits(model(ids)[:, -count:]).argmax(-1).tolist()
        right += [p == list(e.answer) for p, e in zip(predicted, part)]
    return right


@torch.no_grad()
def text_loss(model: Decoder, text: corpus.Corpus, length: int, count: int) -> dict[str, float]:
    """Returns bits per byte of held-out text, by position."""
    rng = random.Random(3)
    total = torch.zeros(length - 1)
    for _ in range(count):
        chunk = tasks.encode(text.filler(rng, length - 1))
        ids = torch.tensor([chunk], device=model.embedding.device)
        nats = F.cross_entropy(model.logits(model(ids)[0, :-1]), ids[0, 1:], reduction="none")
        total += nats.cpu()
    bits = total / count / math.log(2)
    edges = [0, 512] + [n for n in (2048, 8192, 16384, 32768) if n <= length]
    return {f"{a}-{b}": round(float(bits[a:b].mean()), 3) for a, b in zip(edges, edges[1:])}


@torch.no_grad()
def sample(model: Decoder, opening: str, count: int, temperature: float = 0.5) -> str:
    generator = torch.Generator(device=model.embedding.device).manual_seed(0)
    ids = torch.tensor([tasks.encode(opening.encode())], device=model.embedding.device)
    for _ in range(count):
        probabilities = (model.logits(model(ids)[:, -1]) / temperature).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=generator)), 1)
    return tasks.decode(ids[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the embedded model.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--text", nargs="+", required=True, metavar="FOLDER[:WEIGHT]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="2048,4096,8192,16384,32768")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens_per_batch", type=int, default=131072)
    parser.add_argument("--sample_bytes", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = Decoder.load(args.model, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    text = corpus.load(args.text, held_out=True)
    results: dict = {"prompts": args.prompts, "retrieval": {}, "text_bits_per_byte": {}, "samples": []}

    def keep() -> None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    lengths = [int(n) for n in args.lengths.split(",")]
    for length in lengths:
        for task in tasks.TASKS:
            prompts = examples(task, length, args.prompts, text)
            right = right_answers(model, prompts, args.tokens_per_batch)
            tenths = [right[i * len(right) // 10 : (i + 1) * len(right) // 10] for i in range(10)]
            results["retrieval"].setdefault(task, {})[length] = {
                "right": round(sum(right) / len(right), 4),
                "by_depth": [round(sum(t) / len(t), 2) if t else None for t in tenths],
            }
            keep()
        print(length, {t: r[length]["right"] for t, r in results["retrieval"].items()}, flush=True)
    results["text_bits_per_byte"] = text_loss(model, text, max(lengths), 12)
    print(results["text_bits_per_byte"])
    keep()
    for opening in OPENINGS:
        results["samples"].append(sample(model, opening, args.sample_bytes))
        print("---", results["samples"][-1], flush=True)
        keep()


if __name__ == "__main__":
    main()
