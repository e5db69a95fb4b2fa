"""The prompts on which engines are compared."""

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


def prompts(model: Path | None = None) -> dict[str, list[int]]:
    """Returns 13 prompts of 2 to 3,000 tokens, by name.

    model: a folder whose tokenizer.json makes the tokens; without that file, and by default, they are those of the
    byte-level model of this repository.
    """
    if model is not None and (model / "tokenizer.json").exists():
        return _of_tokenizer(model / "tokenizer.json")
    made = {
        f"{task}/{length}": tasks.encode(tasks.make(task, random.Random(i), length=length).prompt)
        for i, (task, length) in enumerate(_TASKS)
    }
    return made | {f"text/{length}": tasks.encode(_TEXT[: length - 1]) for length in _TEXT_LENGTHS}


def _of_tokenizer(file: Path) -> dict[str, list[int]]:
    """The same tasks and lengths. A task keeps its last tokens, with the question; whether it can be answered is not
    what engines are compared for. Texts go on with sentences of the tasks' grammar.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    def encode(text: bytes) -> list[int]:
        return tokenizer.encode(text.decode(), add_special_tokens=False).ids

    made = {}
    for i, (task, length) in enumerate(_TASKS):
        made[f"{task}/{length}"] = encode(tasks.make(task, random.Random(i), length=8 * length).prompt)[-length:]
    chance = random.Random(len(_TASKS))
    text = encode(_TEXT + "".join(tasks.sentence(chance) for _ in range(500)).encode())
    made |= {f"text/{length}": text[:length] for length in _TEXT_LENGTHS}
    for name, tokens in made.items():
        assert len(tokens) == int(name.split("/")[1]), f"{name} has {len(tokens)} tokens"
    return made
