"""Prompts that are graded inside: text in which some stretches must be what greedy decoding would have written.

A question at the end of a prompt is asked by its last rows, which every policy treats with most care. Here the
question stands before the end, as the earlier turns of a conversation do: its answer follows, then text goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import more_tasks  # first: it makes model/tiny importable

import tasks
from corpus import END_OF_FILE

EARLIEST, LATEST = 0.35, 0.90  # where a question ends, as a share of the prompt
AFTER_ANSWER = bytes([END_OF_FILE]) + b"\n"

Task = Callable[[random.Random, int, tasks.Filler, float], tasks.Example]


@dataclass(frozen=True)
class Graded:
    """A text with the stretches that are graded.

    text: END_OF_FILE stands for EOS. spans: (begin, end) in its bytes; a span is right when each of its bytes is the
    likeliest.
    """

    text: bytes
    spans: tuple[tuple[int, int], ...]


def asked_within(
    task: Task, rng: random.Random, size: int, filler: tasks.Filler, depth: float, asked_at: float
) -> Graded:
    """Makes a prompt of `size` ids, BOS included, whose question ends at `asked_at`. The needle lies at `depth` of the
    text before it.
    """
    example = task(rng, round(asked_at * size), filler, depth)
    answered = example.prompt + example.answer + AFTER_ANSWER
    rest = size - 1 - len(answered)
    if rest < 0:
        raise ValueError(f"length {size} is too short for a question at {asked_at:.2f} and its answer")
    return Graded(answered + filler(rng, rest), ((len(example.prompt), len(example.prompt) + len(example.answer)),))


def interleaved(rng: random.Random, size: int) -> Graded:
    """Makes at most `size` ids of `key: value` lines. Every value whose key came before is asked for."""
    text, spans = tasks.interleaved(rng, size)
    return Graded(text, tuple(spans))


WITHIN = {f"{name}_within": task for name, task in {**tasks.TASKS, **more_tasks.TASKS}.items()}
INTERLEAVED = "interleaved"
