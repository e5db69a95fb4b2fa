"""Makes training sequences, and tells the bytes that the model is graded on.

Every sequence is exactly `length` ids and starts with BOS. Each id carries a kind, which sets its weight in the loss:
random keys and numbers cannot be predicted where they are first stated (IGNORE), grammar filler is not worth learning
(FILLER), text is (TEXT), and what can be looked up in the context is what this model is for (ANSWER; STREAM where
hundreds of answers stand in one sequence and would drown the others).
"""

from __future__ import annotations

import random
import string

import numpy as np

import tasks
from corpus import END_OF_FILE, Corpus

IGNORE, FILLER, TEXT, ANSWER, STREAM = range(5)
EOS_BYTE = END_OF_FILE  # stands for EOS until bytes become ids

# Each recipe has a share. Short sequences train recall, and long ones train recall from far away.
SHORT_MIX = {"stream": 0.27, "facts": 0.20, "prompt": 0.15, "key_values": 0.06, "copy": 0.05, "text": 0.27}
LONG_MIX = {"stream": 0.10, "facts": 0.24, "prompt": 0.24, "key_values": 0.10, "copy": 0.05, "text": 0.27}
LONG = 4096


class Sequence:
    """Pieces of bytes with their kinds, joined and cut to length at the end."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.kinds: list[int] = []
        self.size = 1  # BOS

    def add(self, text: bytes | str, kind: int) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.parts.append(data)
        self.kinds.append(kind)
        self.size += len(data)

    def finish(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        data = np.frombuffer(b"".join(self.parts), np.uint8)
        ids = np.full(length, tasks.PAD, np.uint16)
        kinds = np.zeros(length, np.uint8)
        count = min(length - 1, len(data))
        ids[0] = tasks.BOS
        ids[1 : count + 1] = data[:count]
        ids[1 : count + 1][data[:count] == EOS_BYTE] = tasks.EOS
        kinds[1 : count + 1] = np.repeat(np.array(self.kinds, np.uint8), [len(p) for p in self.parts])[:count]
        return ids, kinds


# --- words nobody listed ----------------------------------------------------------------------------------------------


def pseudo_word(rng: random.Random) -> str:
    syllables = rng.choice((1, 2, 2, 3))
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(syllables)) + rng.choice("lnrst")


def pseudo_filler(rng: random.Random, size: int) -> bytes:
    """Makes sentences of made-up words from a vocabulary that is new each time: filler that no grammar predicts."""
    words = [pseudo_word(rng) for _ in range(rng.choice((40, 200, 800)))]
    text = rng.choices(words, k=size // 4 + 8)
    at = 0
    while at < len(text):
        text[at] = text[at].capitalize()
        at += rng.randrange(4, 14)
        if at <= len(text):
            text[at - 1] += "."
    return " ".join(text).encode().ljust(size)[:size]


def _key(rng: random.Random, style: int, size: int) -> str:
    if style == 0:
        return tasks.hex_key(rng, size)
    if style == 1:
        return tasks.digits(rng, size)
    if style == 2:
        return "".join(rng.choices(string.ascii_lowercase, k=size))
    if style == 3:
        return tasks.name(rng)
    return pseudo_word(rng) + rng.choice(("", "-", "_")) + pseudo_word(rng)


def _value(rng: random.Random, style: int, size: int) -> str:
    if style < 4:
        return tasks.digits(rng, size)
    if style == 4:
        return tasks.repeating_digits(rng, size + 3)
    if style == 5:
        return "".join(rng.choices(string.ascii_lowercase, k=size))
    if style == 6:
        return rng.choice(tasks.NOUNS)
    return pseudo_word(rng)


# --- recipes ----------------------------------------------------------------------------------------------------------


class Mix:
    def __init__(self, corpus: Corpus, seed: int):
        self.corpus = corpus
        self.rng = random.Random(seed)

    def batch(self, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids [count, length] uint16 and kinds [count, length] uint8."""
        mix = SHORT_MIX if length < LONG else LONG_MIX
        names = self.rng.choices(list(mix), list(mix.values()), k=count)
        rows = [getattr(self, name)(length) for name in names]
        return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])

    def _filler(self) -> tuple[tasks.Filler, int]:
        """Returns a filler and the kind of its bytes."""
        draw = self.rng.random()
        if draw < 0.45:
            return self.corpus.filler, TEXT
        if draw < 0.80:
            return tasks.sentence_filler, FILLER
        if draw < 0.93:
            return pseudo_filler, IGNORE
        return tasks.classic_filler, FILLER

    def text(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        sequence = Sequence()
        sequence.add(self.corpus.chunk(self.rng, length - 1), TEXT)
        return sequence.finish(length)

    def prompt(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes a prompt as evaluation poses it, with its answer and EOS."""
        rng = self.rng
        task = rng.choices(list(tasks.TASKS), (4, 2, 2, 3))[0]
        filler, kind = self._filler()
        size = length - 16
        if task == "pass_key":
            example = tasks.pass_key(rng, size, filler, rng.random(), rng.choice((3, 4, 5, 5, 5, 6, 8)))
        elif task == "number_string":
            example = tasks.number_string(rng, size, filler, rng.random(), rng.choice((6, 8, 10, 10, 12)))
        elif task == "multi_needle":
            example = tasks.multi_needle(rng, size, filler, rng.random(), rng.randrange(1, 1 + min(8, length // 128)))
        else:
            example = tasks.key_value(rng, size, filler, rng.random())
        sequence = Sequence()
        sequence.add(example.prompt, IGNORE if task == "key_value" else kind)
        sequence.add(example.answer + bytes([EOS_BYTE]), ANSWER)
        return sequence.finish(length)

    def stream(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes lines of key and value in which keys come back: an answer every few bytes, at every distance."""
        rng, sequence = self.rng, Sequence()
        key_style, key_size = rng.randrange(5), rng.randrange(2, 8)
        value_style, value_size = rng.randrange(8), rng.randrange(1, 7)
        head, middle, tail = rng.choice(
            (("key ", ": ", "\n"), ("", ": ", "\n"), ("", "=", "; "), ('"', '": "', '", '), ("", " -> ", "\n"),
             ("the ", " is ", ". "), ("", " ", "\n"))  # fmt: skip
        )
        new = rng.uniform(0.25, 0.7)
        known: dict[str, str] = {}
        keys: list[str] = []
        while sequence.size < length:
            if not keys or rng.random() < new:
                key, value = _key(rng, key_style, key_size), _value(rng, value_style, value_size)
                if key not in known:
                    known[key] = value
                    keys.append(key)
                    sequence.add(head + key + middle + value + tail, IGNORE)
                    continue
            else:
                key = keys[int(rng.random() * len(keys))]
            sequence.add(head + key + middle, IGNORE)
            sequence.add(known[key] + tail[0], STREAM)
            if len(tail) > 1:
                sequence.add(tail[1:], IGNORE)
        return sequence.finish(length)

    def key_values(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes a list of `key …: …` lines, then asks for many of its keys in words."""
        rng, sequence = self.rng, Sequence()
        size = rng.choice((3, 4, 6, 6, 6))
        asked = max(1, int(length * rng.uniform(0.05, 0.4) / 70))
        line = len(tasks.key_value_line("0" * size, "0" * 5))
        known: dict[str, str] = {}
        for _ in range(max(1, (length - 1 - 77 * asked) // line)):
            known.setdefault(tasks.hex_key(rng, size), tasks.digits(rng, 5))
        for key, value in known.items():
            sequence.add(tasks.key_value_line(key, value), IGNORE)
        for key in rng.choices(list(known), k=asked):
            sequence.add(tasks.key_value_question(key), FILLER)
            sequence.add(known[key].encode() + bytes([EOS_BYTE]), ANSWER)
        return sequence.finish(length)

    def copy(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes passages that come back word for word. They are graded from where the repeat is beyond doubt."""
        rng, sequence = self.rng, Sequence()
        filler, kind = self._filler()
        passages: list[bytes] = []
        while sequence.size < length:
            if passages and rng.random() < 0.5:
                passage = passages[int(rng.random() * len(passages))]
                sequence.add(passage[:20], IGNORE)
                sequence.add(passage[20:], STREAM)
            else:
                passages.append(filler(rng, rng.randrange(40, max(60, min(400, length // 6)))))
                sequence.add(passages[-1], kind)
            sequence.add("\n", IGNORE)
        return sequence.finish(length)

    def facts(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes facts of several kinds in filler, each asked for later, in the middle or at the end."""
        rng = self.rng
        most = max(1, min(80, length // 160))
        facts = [self._fact() for _ in range(rng.randrange(1, most + 1))]
        facts = list({question: (statement, question, value) for statement, question, value in facts}.values())
        events: list[tuple[float, str, bytes]] = []  # time 0..1, text before the answer, answer or nothing
        for statement, question, value in facts:
            stated = rng.random() ** 1.3
            events.append((stated, " " + statement + rng.choice((" ", "\n")), b""))
            for _ in range(rng.choice((1, 1, 1, 2))):
                asked = 1.0 if rng.random() < 0.5 else rng.uniform(stated, 1)
                events.append((asked, question, value.encode() + bytes([EOS_BYTE])))
        rng.shuffle(events)
        events.sort(key=lambda event: (event[0], bool(event[2])))
        filler, kind = self._filler()
        room = length - 1 - sum(len(text) + len(answer) + 1 for _, text, answer in events)
        text, done, sequence = filler(rng, max(0, room)), 0, Sequence()
        for time, before, answer in events:
            cut = int(time * len(text))
            sequence.add(text[done:cut], kind)
            done = cut
            sequence.add(before, FILLER)
            if answer:
                sequence.add(answer, ANSWER)
                sequence.add("\n", IGNORE)
        return sequence.finish(length)

    def _fact(self) -> tuple[str, str, str]:
        """Returns statement, question and answer."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.2:
            value = tasks.digits(rng, rng.choice((3, 4, 5, 5, 5, 6, 8)))
            return tasks.pass_key_statement(value), tasks.PASS_KEY_QUESTION, value
        if draw < 0.3:
            value = tasks.repeating_digits(rng, rng.choice((6, 8, 10, 10, 12)))
            return tasks.number_string_statement(value), tasks.NUMBER_STRING_QUESTION, value
        if draw < 0.5:
            key, value = tasks.hex_key(rng), tasks.digits(rng, 5)
            return tasks.key_value_line(key, value).strip(), tasks.key_value_question(key), value
        who = tasks.name(rng) if rng.random() < 0.6 else _key(rng, 4, 4)
        if draw < 0.75:
            value = tasks.digits(rng, 5)
            return tasks.needle_statement(who, value), tasks.needle_question(who), value
        what = rng.choice(("password", "code", "colour", "room", "age", "price", "home", "favourite word", "secret"))
        value = _value(rng, rng.randrange(8), rng.randrange(2, 7))
        return f"The {what} of {who} is {value}.", f"\nWhat is the {what} of {who}? The {what} of {who} is ", value
