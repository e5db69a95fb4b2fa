"""Prompts of an exact length in tokens, for the embedded model and for any model with a tokenizer.json.

A prompt is a pure function of (task, length, index, seed): every setting answers the same ones, and
an interrupted run goes on with the same ones. Standard library only, save for real tokenizers.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import more_tasks  # first: it makes model/tiny importable

import corpus
import tasks

TASKS = {**tasks.TASKS, **more_tasks.TASKS}
TEXT = "text"  # the next token of held-out text, for perplexity
ANSWER_ROOM = 32  # tokens kept free for the answer, below the model's limit


@dataclass(frozen=True)
class Prompt:
    task: str
    length: int
    index: int
    depth: float | None  # None for text
    tokens: list[int]
    answer: bytes  # what the generated text has to begin with
    next_token: int | None = None  # of text
    max_new_tokens: int = 1


class ByteCodec:
    """The embedded model: a token is a byte, after one BOS."""

    def fit(self, example_of_size, length: int) -> tuple[list[int], bytes]:
        """Exactly `length` ids, and the answer; example_of_size(bytes + 1) -> tasks.Example."""
        example = example_of_size(length)
        return tasks.encode(example.prompt), example.answer

    def encode_text(self, text: bytes, length: int) -> list[int]:
        return tasks.encode(text)[:length]

    def text_bytes(self, length: int) -> int:
        """Bytes of text that give at least `length` ids."""
        return length

    def answer_tokens(self, answer: bytes) -> int:
        return len(answer)

    def decode(self, ids: list[int]) -> bytes:
        return tasks.decode(ids)


class TokenizerCodec:
    """A checkpoint folder with tokenizer.json (needs the `tokenizers` package)."""

    BYTES_PER_TOKEN = 4.0  # where the search begins; English has about that
    CLOSE_ENOUGH = 0.99
    ATTEMPTS = 8

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def fit(self, example_of_size, length: int) -> tuple[list[int], bytes]:
        """At most `length` ids, at least 99 % of it.

        The blank before an answer belongs to the answer's first token in most vocabularies, so the
        prompt ends before it and answers are compared without it.
        """
        size, best = int(length * self.BYTES_PER_TOKEN), None
        for _ in range(self.ATTEMPTS):
            example = example_of_size(size)
            ids = self._tokenizer.encode(example.prompt.rstrip(b" ").decode(errors="replace")).ids
            if len(ids) <= length and (best is None or len(ids) > len(best[0])):
                best = ids, example.answer.lstrip()
            if self.CLOSE_ENOUGH * length <= len(ids) <= length:
                break
            size = int(size * (1 + self.CLOSE_ENOUGH) / 2 * length / len(ids))
        if best is None:
            raise ValueError(f"no prompt of {length} tokens found")
        return best

    def encode_text(self, text: bytes, length: int) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="ignore")).ids[:length]

    def text_bytes(self, length: int) -> int:
        return 8 * length

    def answer_tokens(self, answer: bytes) -> int:
        """With room for a blank, and for digits that the model groups in another way."""
        return len(self._tokenizer.encode(answer.decode(), add_special_tokens=False).ids) + 4

    def decode(self, ids: list[int]) -> bytes:
        return self._tokenizer.decode(ids).lstrip().encode()


class Prompts:
    """Makes them. `text` is held-out text or None, `depths` how many depths from 0 to 1 take turns.

    limit: tokens that the model takes, prompt and answer together; a prompt of that length is made
    shorter by the room for its answer.
    """

    def __init__(self, codec, text: corpus.Corpus | None, depths: int, seed: int, limit: int):
        self._codec, self._text, self._depths, self._seed = codec, text, depths, seed
        self._longest = limit - ANSWER_ROOM
        self._fillers = [tasks.sentence_filler] + ([text.filler] if text else [])

    def depth(self, task: str, index: int) -> float | None:
        if task == TEXT:
            return None
        return 0.5 if self._depths == 1 else round(index % self._depths / (self._depths - 1), 4)

    def make(self, task: str, length: int, index: int) -> Prompt:
        if task == TEXT:
            return self._text_prompt(length, index)
        depth = self.depth(task, index)
        # Depths and fillers take turns, each depth with each filler.
        filler = self._fillers[index // self._depths % len(self._fillers)]

        def example_of_size(size: int) -> tasks.Example:
            return TASKS[task](self._random(task, length, index), size, filler, depth)

        ids, answer = self._codec.fit(example_of_size, min(length, self._longest))
        return Prompt(task, length, index, depth, ids, answer, max_new_tokens=self._codec.answer_tokens(answer))

    def _text_prompt(self, length: int, index: int) -> Prompt:
        if self._text is None:
            raise ValueError("no held-out text was given")
        size = min(length, self._longest)
        text = self._text.filler(self._random(TEXT, length, index), self._codec.text_bytes(size + 1))
        ids = self._codec.encode_text(text, size + 1)
        if len(ids) <= size:
            raise ValueError(f"held-out text gave {len(ids)} tokens; {size + 1} are needed")
        return Prompt(TEXT, length, index, None, ids[:size], b"", next_token=ids[size])

    def _random(self, task: str, length: int, index: int) -> random.Random:
        return random.Random(f"{self._seed} {task} {length} {index}")


def digest(text: corpus.Corpus | None) -> str:
    """Says whether two evaluations drew their prompts from the same text."""
    whole = hashlib.sha256()
    for blob, weight in zip(text.blobs, text.weights) if text else ():
        whole.update(f"{weight} {len(blob)} ".encode() + blob)
    return whole.hexdigest()[:16] if text else ""


def load_text(trained_on: list[str], unseen: list[str]) -> corpus.Corpus | None:
    """Text the model has not seen: the held-out part of the folders it was trained on, and all of the others."""
    parts = [corpus.load(trained_on, held_out=True)] if trained_on else []
    for folder in unseen:
        both = []
        for held_out in (False, True):
            try:
                both.append(corpus.load([folder], held_out))
            except ValueError as error:  # all of a small folder may fall to one side of the split
                reason = error
        if not both:
            raise reason
        parts += both
    if not parts:
        return None
    blobs = [blob for part in parts for blob in part.blobs]
    weights = [weight for part in parts for weight in part.weights]
    return corpus.Corpus(blobs, weights)
