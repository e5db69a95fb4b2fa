"""Retrieval prompts over bytes: pass key, number string, key-value look-up, many needles; and their scorer.

The one definition of these formats. Training, evaluation, the tests and the quick start all use it, so it needs nothing
but the standard library. A prompt is text with one question at its end; the model is right when the text it generates
starts with the answer. Tokens are bytes, after one BOS; the model ends an answer with EOS.

    example = make("pass_key", random.Random(1), length=16384)
    ids = encode(example.prompt)            # exactly 16384 ids, BOS included
    is_right(example, generated_bytes)

As a program it writes one example as JSON: tasks.py pass_key --length 8192 --seed 7 --depth 0.3
"""

from __future__ import annotations

import argparse
import json
import random
import string
from dataclasses import asdict, dataclass
from typing import Callable

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 264  # 256 bytes, three specials, five never trained

# filler(rng, size) -> exactly `size` bytes for a needle to hide in.
Filler = Callable[[random.Random, int], bytes]


@dataclass(frozen=True)
class Example:
    task: str
    prompt: bytes
    answer: bytes
    depth: float  # where the needle lies: 0 is the start of the prompt, 1 its end


def encode(prompt: bytes) -> list[int]:
    return [BOS, *prompt]


def decode(ids: list[int]) -> bytes:
    """Returns the bytes before the first EOS. Other specials have no text."""
    if EOS in ids:
        ids = ids[: ids.index(EOS)]
    return bytes(i for i in ids if i < 256)


def is_right(example: Example, generated: bytes) -> bool:
    return generated.startswith(example.answer)


# --- words ------------------------------------------------------------------------------------------------------------

ADJECTIVES = """amber ancient blue bold brave bright broken busy calm careful clever cold crimson curious dark deep
distant dusty eager early empty faint gentle golden grand green grey happy heavy hidden hollow honest hungry idle
iron jolly kind large late lazy light little lonely loud lucky mellow narrow new noble odd old orange pale patient
plain polite proud purple quick quiet rapid rare red rough round rusty scarlet secret sharp shy silent silver simple
slow small smooth soft solid steady strange strong sudden sunny swift tall tame tender thin tidy tiny violet warm
weary white wide wild wise wooden yellow young""".split()

NOUNS = """anchor apple archer badger baker barrel beacon bell bird boat bottle branch bridge brother bucket builder
candle captain castle cat chair child circle city clerk clock cloud coat coin corner cottage cousin dancer doctor
dog donkey door dragon driver eagle engine falcon farmer father feather fence field finger fire fisher flower forest
fox friend garden gate girl glass goat guard hammer harbour hat hill horse house hunter island jacket judge kettle
key king kitchen ladder lake lamp lantern leaf letter library lion map market mason meadow merchant mill miner
mirror mother mountain mouse needle neighbour nurse ocean orchard otter owl painter paper path pilot pirate planet
pocket poet pond potter rabbit rider ring river road robin rope sailor school shadow sheep shepherd ship shoe singer
sister soldier spider spoon stable star station stone storm street student table tailor teacher tiger tower traveller
tree turtle uncle valley village violin wagon wall watch well wheel whale widow wind window winter wolf woman worker
writer""".split()

VERBS = """admired asked avoided believed borrowed bought broke brought built called carried caught chased cleaned
climbed counted crossed described drew dropped enjoyed examined feared fixed followed forgot found gathered greeted
guarded heard held helped ignored invited kept kicked knew left liked lifted lost loved measured mended met missed
moved needed noticed opened ordered packed painted passed paid placed praised protected pulled pushed questioned
raised reached remembered repaired returned saw searched sold sent shook showed signed stopped studied tasted taught
thanked threw told took touched traded trusted visited warned washed watched welcomed wrote""".split()

PLACES = """above the clouds|across the river|after the storm|along the coast|around the corner|at the market|before dawn
behind the mill|below the bridge|beside the lake|beyond the hills|by the open window|during the long winter
for the third time|from the far village|in the evening|in the old library|inside the tower|near the harbour
on a rainy morning|on the wooden table|outside the city|over the wall|past the orchard|through the forest
under the oak tree|until midnight|with great care|with a smile|without a word|without any help""".replace(
    "\n", "|"
).split("|")

OPENINGS = """At first|At last|Every morning|For many years|In the end|Later that day|Long ago|Meanwhile|Nobody knew why, but
Of course|On most days|Once again|One evening|Sometimes|Soon after|Suddenly|That night|The next day|To be sure|Year after year""".replace(
    "\n", "|"
).split("|")

CLASSIC = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def _noun_phrase(rng: random.Random) -> str:
    adjective = ADJECTIVES[int(rng.random() * len(ADJECTIVES))]
    noun = NOUNS[int(rng.random() * len(NOUNS))]
    return f"{adjective} {noun}" if rng.random() < 0.6 else noun


def sentence(rng: random.Random) -> str:
    """Makes a plain English sentence from a word grammar with some 10^13 sentences, so that filler does not repeat."""
    subject, thing = _noun_phrase(rng), _noun_phrase(rng)
    verb = VERBS[int(rng.random() * len(VERBS))]
    place = PLACES[int(rng.random() * len(PLACES))]
    form = int(rng.random() * 6)
    if form == 0:
        return f"The {subject} {verb} the {thing}. "
    if form == 1:
        return f"The {subject} {verb} the {thing} {place}. "
    if form == 2:
        opening = OPENINGS[int(rng.random() * len(OPENINGS))]
        return f"{opening} the {subject} {verb} the {thing}. "
    if form == 3:
        return f"The {subject} and the {_noun_phrase(rng)} {verb} the {thing} {place}. "
    if form == 4:
        return f"When the {subject} {verb} the {thing}, the {_noun_phrase(rng)} was {place}. "
    return f"The {subject}, who {verb} the {thing}, had never seen the {_noun_phrase(rng)}. "


def sentence_filler(rng: random.Random, size: int) -> bytes:
    parts, total = [], 0
    while total < size:
        part = sentence(rng)
        if rng.random() < 0.08:
            part += "\n"
        parts.append(part)
        total += len(part)
    return "".join(parts).encode()[:size]


def classic_filler(rng: random.Random, size: int) -> bytes:
    """Returns the five sentences that pass-key tests elsewhere repeat."""
    start = rng.randrange(len(CLASSIC)) if rng.random() < 0.5 else 0
    text = CLASSIC.encode()
    return (text * (size // len(text) + 2))[start : start + size]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def repeating_digits(rng: random.Random, count: int) -> str:
    """Makes digits that come in runs (7733300912), so that a copy must keep count and not only recall the last digit.
    """
    text = ""
    while len(text) < count:
        text += rng.choice(string.digits) * rng.choice((1, 1, 2, 2, 3))
    return text[:count]


def hex_key(rng: random.Random, count: int = 6) -> str:
    return f"{rng.getrandbits(4 * count):0{count}x}"


def name(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


# --- the formats ------------------------------------------------------------------------------------------------------
# statement: what stands in the text.  question: what ends the prompt; the answer follows at once.


def pass_key_statement(key: str) -> str:
    return f"The pass key is {key}. Remember it."


PASS_KEY_QUESTION = "\nWhat is the pass key? The pass key is "


def number_string_statement(number: str) -> str:
    return f"The number string is {number}. Remember it."


NUMBER_STRING_QUESTION = "\nWhat is the number string? The number string is "


def needle_statement(who: str, number: str) -> str:
    return f"The special number for {who} is {number}."


def needle_question(who: str) -> str:
    return f"\nWhat is the special number for {who}? The special number for {who} is "


def key_value_line(key: str, value: str) -> str:
    return f"key {key}: {value}\n"


def key_value_question(key: str) -> str:
    return f"\nWhat is the value of key {key}? The value of key {key} is "


# --- whole prompts ----------------------------------------------------------------------------------------------------


def _hide(rng: random.Random, filler: Filler, size: int, needles: list[tuple[float, str]]) -> bytes:
    """Returns `size` bytes of filler in which each needle stands at its depth (0..1), set off by blanks."""
    needles = sorted(needles)
    room = size - sum(len(text) + 2 for _, text in needles)
    if room < 0:
        raise ValueError(f"size {size} is too short for {len(needles)} needles")
    text = filler(rng, room)
    parts, done = [], 0
    for depth, needle in needles:
        cut = round(depth * room)
        parts += [text[done:cut], b" ", needle.encode(), b" "]
        done = cut
    return b"".join([*parts, text[done:]])


def pass_key(rng: random.Random, length: int, filler: Filler, depth: float, num_digits: int = 5) -> Example:
    key = digits(rng, num_digits)
    size = length - 1 - len(PASS_KEY_QUESTION)
    body = _hide(rng, filler, size, [(depth, pass_key_statement(key))])
    return Example("pass_key", body + PASS_KEY_QUESTION.encode(), key.encode(), depth)


def number_string(rng: random.Random, length: int, filler: Filler, depth: float, num_digits: int = 10) -> Example:
    number = repeating_digits(rng, num_digits)
    size = length - 1 - len(NUMBER_STRING_QUESTION)
    body = _hide(rng, filler, size, [(depth, number_string_statement(number))])
    return Example("number_string", body + NUMBER_STRING_QUESTION.encode(), number.encode(), depth)


def multi_needle(rng: random.Random, length: int, filler: Filler, depth: float, num_needles: int = 8) -> Example:
    """Makes `num_needles` named numbers. The one asked for lies at `depth`, the others anywhere."""
    names: list[str] = []
    while len(names) < num_needles:
        candidate = name(rng)
        if candidate not in names:
            names.append(candidate)
    numbers = [digits(rng, 5) for _ in names]
    depths = [depth] + [rng.random() for _ in names[1:]]
    question = needle_question(names[0]).encode()
    needles = [(d, needle_statement(w, n)) for d, w, n in zip(depths, names, numbers)]
    body = _hide(rng, filler, length - 1 - len(question), needles)
    return Example("multi_needle", body + question, numbers[0].encode(), depth)


def key_value(rng: random.Random, length: int, filler: Filler, depth: float) -> Example:
    """Makes only `key 4f9a2c: 58210` lines, every key once. Filler takes the odd bytes at the start."""
    question_size = len(key_value_question("0" * 6))
    line_size = len(key_value_line("0" * 6, "0" * 5))
    count, rest = divmod(length - 1 - question_size, line_size)
    if count < 1:
        raise ValueError(f"length {length} is too short for a key and its question")
    keys: dict[str, str] = {}
    while len(keys) < count:
        keys[hex_key(rng)] = digits(rng, 5)
    pairs = list(keys.items())
    asked, answer = pairs[min(count - 1, int(depth * count))]
    lines = "".join(key_value_line(k, v) for k, v in pairs)
    head = filler(rng, rest - 1) + b"\n" if rest else b""
    prompt = head + lines.encode() + key_value_question(asked).encode()
    return Example("key_value", prompt, answer.encode(), depth)


def interleaved(rng: random.Random, length: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Makes `key …: …` lines in which every other key came before, and returns the (begin, end) of the values that can
    be recalled.

    Every row asks a question, not only the last, which is what a sparse prefill must not lose. The prompt is `length`
    ids at most.
    """
    known: dict[str, str] = {}
    lines, spans, size = [], [], 0
    while True:
        again = bool(known) and rng.random() < 0.5
        key = rng.choice(list(known)) if again else hex_key(rng)
        line = key_value_line(key, known.setdefault(key, digits(rng, 5)))
        if size + len(line) > length - 1:
            return "".join(lines).encode(), spans
        if again:
            spans.append((size + len(line) - 6, size + len(line) - 1))
        lines.append(line)
        size += len(line)


TASKS = {"pass_key": pass_key, "number_string": number_string, "key_value": key_value, "multi_needle": multi_needle}


def make(
    task: str, rng: random.Random, length: int, filler: Filler = sentence_filler, depth: float | None = None
) -> Example:
    """Makes an example whose prompt is exactly `length` ids long, BOS included. If depth is None, the needle lies
    anywhere.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} unknown; one of {', '.join(TASKS)}")
    return TASKS[task](rng, length, filler, rng.random() if depth is None else depth)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write one retrieval prompt as JSON.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--length", type=int, default=8192, help="prompt length in ids, BOS included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=float, default=None, help="0 start, 1 end; anywhere when absent")
    args = parser.parse_args()
    example = asdict(make(args.task, random.Random(args.seed), args.length, depth=args.depth))
    print(json.dumps({k: v.decode() if isinstance(v, bytes) else v for k, v in example.items()}))


if __name__ == "__main__":
    main()
