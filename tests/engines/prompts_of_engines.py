"""The prompts on which engines are compared, for the byte-level model of this repository."""

from __future__ import annotations

import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "model" / "tiny"), str(ROOT / "tests" / "evaluation")]
import tasks  # noqa: E402

_TEXT = Path(__file__).with_name("prompt_text.txt").read_bytes()  # fixed, so that results can be compared
_TASKS = (("pass_key", 300), ("number_string", 700), ("key_value", 1500), ("multi_needle", 2048), ("pass_key", 3000))
_TEXT_LENGTHS = (2, 17, 127, 128, 129, 257, 1000, 2500)  # around vLLM's blocks of 128 tokens on a CPU


def prompts() -> dict[str, list[int]]:
    """Returns 13 prompts of 2 to 3,000 tokens, by name."""
    made = {
        f"{task}/{length}": tasks.encode(tasks.make(task, random.Random(i), length=length).prompt)
        for i, (task, length) in enumerate(_TASKS)
    }
    return made | {f"text/{length}": tasks.encode(_TEXT[: length - 1]) for length in _TEXT_LENGTHS}
