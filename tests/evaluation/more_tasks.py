"""Tasks beside those of model/tiny/tasks.py, in the same form: (rng, length, filler, depth) -> Example."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "model" / "tiny"))
import tasks  # noqa: E402

hide = tasks._hide  # the one way needles are put into filler

HOPS = 2
CHAINS = 3
PASSAGE_BYTES = 120
CUE_BYTES = 40  # at most: cue and answer end between words, where tokenizers part text too
COPIED_BYTES = 20


def _distinct_names(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[tasks.name(rng)] = None
    return list(names)


def variable_tracking(rng: random.Random, length: int, filler: tasks.Filler, depth: float) -> tasks.Example:
    """Makes `VAR a = 58210.`, later `VAR b = VAR a.`, and so on, and asks for the value of the last one of the chain.

    The chain that is asked for begins at `depth`; its links follow in order up to the end of the text. Other chains lie
    anywhere, so that the answer cannot be found without following.
    """
    needles, asked, answer = [], "", ""
    for chain in range(CHAINS):
        names, number = _distinct_names(rng, HOPS + 1), tasks.digits(rng, 5)
        begin = depth if chain == 0 else rng.random()
        places = [begin] + sorted(rng.uniform(begin, 1) for _ in range(HOPS))
        sources = [number] + [f"VAR {name}" for name in names[:-1]]
        needles += [(p, f"VAR {name} = {source}.") for p, name, source in zip(places, names, sources)]
        if chain == 0:
            asked, answer = names[-1], number
    question = f"\nWhat is the value of VAR {asked}? The value of VAR {asked} is ".encode()
    body = hide(rng, filler, length - 1 - len(question), needles)
    return tasks.Example("variable_tracking", body + question, answer.encode(), depth)


def copy(rng: random.Random, length: int, filler: tasks.Filler, depth: float) -> tasks.Example:
    """Makes a prompt that ends in the first bytes of a passage at `depth`. The answer is how the passage continues.

    Passages are sentences of the word grammar whatever the filler, so that their continuation can be found only by
    looking it up.
    """
    passage = tasks.sentence_filler(rng, PASSAGE_BYTES).replace(b"\n", b" ")
    split = passage.rindex(b" ", 0, CUE_BYTES) + 1
    cue, answer = b"\n" + passage[:split], passage[split : passage.rindex(b" ", split, split + COPIED_BYTES)]
    room = length - 1 - len(cue) - len(passage) - 2
    if room < 0:
        raise ValueError(f"length {length} is too short for a passage and its copy")
    text = filler(rng, room)
    cut = round(depth * room)
    body = text[:cut] + b"\n" + passage + b"\n" + text[cut:]
    return tasks.Example("copy", body + cue, answer, depth)


TASKS = {"variable_tracking": variable_tracking, "copy": copy}
