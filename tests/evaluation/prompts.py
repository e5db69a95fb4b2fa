"""Prompts of an exact length in tokens, for the embedded model and for any model with a tokenizer.json.

A prompt is a pure function of (task, length, index, seed): every setting answers the same ones, and
an interrupted run goes on with the same ones. Standard library only, save for real tokenizers.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

import more_tasks  # first: it makes model/tiny importable

import corpus
import graded
import tasks
from graded import INTERLEAVED, WITHIN, Graded

AT_THE_END = {**tasks.TASKS, **more_tasks.TASKS}
TEXT = "text"  # held-out text, for perplexity
TASKS = (*AT_THE_END, *WITHIN, INTERLEAVED, TEXT)
NOT_LEARNT = ("variable_tracking", "variable_tracking_within")  # by the embedded model
ANSWER_ROOM = 32  # tokens kept free for a generated answer, below the model's limit
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly, however many there are

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt of one of three kinds: a question at its end (`answer` is to be generated), questions within it
    (`spans`), or text.
    """

    task: str
    length: int
    index: int
    tokens: list[int]
    depth: float | None = None  # of the needle, in what stands before the question
    asked_at: float | None = None  # where a question within ends, as a share of the prompt
    answer: bytes = b""  # what the generated text has to begin with
    max_new_tokens: int = 0
    spans: Spans = ()  # (begin, end) of tokens; one is right when each of its tokens is the likeliest
    text_bytes: int = 0  # of text: what all tokens but the first stand for


def group(task: str) -> str | None:
    """Returns the mean in which a task counts: "end" or "within", or None for text, which has no score."""
    if task == TEXT:
        return None
    return "end" if task in AT_THE_END else "within"


class ByteCodec:
    """Tokens of the embedded model: each is a byte, after one BOS."""

    def fit(self, example_of_size, length: int) -> tuple[list[int], bytes]:
        """Returns exactly `length` ids, and the answer. example_of_size(bytes + 1) makes a tasks.Example."""
        example = example_of_size(length)
        return tasks.encode(example.prompt), example.answer

    def fit_graded(self, graded_of_size, length: int) -> tuple[list[int], Spans]:
        """Returns as many ids as the text of graded_of_size(bytes + 1), a Graded, has bytes, and its spans in ids."""
        made: Graded = graded_of_size(length)
        ids = [tasks.EOS if byte == corpus.END_OF_FILE else byte for byte in made.text]
        return [tasks.BOS, *ids], tuple((begin + 1, end + 1) for begin, end in made.spans)

    def encode_text(self, text: bytes, length: int) -> list[int]:
        return tasks.encode(text)[:length]

    def text_bytes(self, length: int) -> int:
        """Returns how many bytes of text give at least `length` ids."""
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
        """Returns at most `length` ids, at least 99 % of it, and the answer.

        The blank before an answer belongs to the answer's first token in most vocabularies, so the prompt ends before
        it and answers are compared without it.
        """

        def encoded(size: int) -> tuple[list[int], bytes]:
            example = example_of_size(size)
            ids = self._tokenizer.encode(example.prompt.rstrip(b" ").decode(errors="replace")).ids
            return ids, example.answer.lstrip()

        return self._fitted(encoded, length)

    def fit_graded(self, graded_of_size, length: int) -> tuple[list[int], Spans]:
        """Does as fit(). A token that holds any part of a span, even only its blank, belongs to the span."""

        def encoded(size: int) -> tuple[list[int], Spans]:
            made: Graded = graded_of_size(size)
            # The end of a turn has no text that all vocabularies share. Spans lie before it.
            text = made.text.replace(bytes([corpus.END_OF_FILE]), b"")
            encoding = self._tokenizer.encode(text.decode(errors="replace"))
            return encoding.ids, self._token_spans(encoding.offsets, text, made.spans)

        return self._fitted(encoded, length)

    @staticmethod
    def _token_spans(offsets: list[tuple[int, int]], text: bytes, spans: Spans) -> Spans:
        """Converts spans to tokens. offsets: of every token, in characters; empty for tokens without text, such as BOS.
        """

        def character(place: int) -> int:
            return place if text.isascii() else len(text[:place].decode(errors="replace"))

        of_text = [i for i, (begin, end) in enumerate(offsets) if begin < end]
        begins, ends = [offsets[i][0] for i in of_text], [offsets[i][1] for i in of_text]
        return tuple(
            (of_text[bisect_right(ends, character(begin))], of_text[bisect_left(begins, character(end)) - 1] + 1)
            for begin, end in spans
        )

    def _fitted(self, encoded_of_size, length: int):
        size, best = int(length * self.BYTES_PER_TOKEN), None
        for _ in range(self.ATTEMPTS):
            ids, rest = encoded_of_size(size)
            if len(ids) <= length and (best is None or len(ids) > len(best[0])):
                best = ids, rest
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
        """Returns the tokens that an answer may take, with room for a blank and for other groupings of digits."""
        return len(self._tokenizer.encode(answer.decode(), add_special_tokens=False).ids) + 4

    def decode(self, ids: list[int]) -> bytes:
        return self._tokenizer.decode(ids).lstrip().encode()


class Prompts:
    """Makes prompts. `text` is held-out text or None; `depths` is the number of depths, from 0 to 1, that are used in
    turn.

    limit: tokens that the model takes, prompt and answer together. A prompt of that length whose answer is generated is
    made shorter by the room for it.
    """

    def __init__(self, codec, text: corpus.Corpus | None, depths: int, seed: int, limit: int):
        self._codec, self._text, self._depths, self._seed, self._limit = codec, text, depths, seed, limit
        self._fillers = [tasks.sentence_filler] + ([text.filler] if text else [])

    def depth(self, index: int) -> float:
        return 0.5 if self._depths == 1 else round(index % self._depths / (self._depths - 1), 4)

    def make(self, task: str, length: int, index: int) -> Prompt:
        if task == TEXT:
            return self._text_prompt(length, index)
        if task == INTERLEAVED:
            return self._interleaved(length, index)
        # Depths and fillers are used in turn, so that each depth meets each filler.
        filler = self._fillers[index // self._depths % len(self._fillers)]
        return (self._at_the_end if task in AT_THE_END else self._within)(task, length, index, filler)

    def _at_the_end(self, task: str, length: int, index: int, filler: tasks.Filler) -> Prompt:
        depth = self.depth(index)

        def example_of_size(size: int) -> tasks.Example:
            return AT_THE_END[task](self._random(task, length, index), size, filler, depth)

        ids, answer = self._codec.fit(example_of_size, min(length, self._limit - ANSWER_ROOM))
        room = self._codec.answer_tokens(answer)
        return Prompt(task, length, index, ids, depth, answer=answer, max_new_tokens=room)

    def _within(self, task: str, length: int, index: int, filler: tasks.Filler) -> Prompt:
        depth = self.depth(index)
        turn = (random.Random(f"{self._seed} {task} {length}").random() + index * GOLDEN) % 1
        asked_at = round(graded.EARLIEST + turn * (graded.LATEST - graded.EARLIEST), 4)

        def graded_of_size(size: int) -> Graded:
            return graded.asked_within(WITHIN[task], self._random(task, length, index), size, filler, depth, asked_at)

        ids, spans = self._codec.fit_graded(graded_of_size, min(length, self._limit))
        return Prompt(task, length, index, ids, depth, asked_at, spans=spans)

    def _interleaved(self, length: int, index: int) -> Prompt:
        def graded_of_size(size: int) -> Graded:
            return graded.interleaved(self._random(INTERLEAVED, length, index), size)

        ids, spans = self._codec.fit_graded(graded_of_size, min(length, self._limit))
        return Prompt(INTERLEAVED, length, index, ids, spans=spans)

    def _text_prompt(self, length: int, index: int) -> Prompt:
        if self._text is None:
            raise ValueError("no held-out text was given")
        size = min(length, self._limit)
        text = self._text.filler(self._random(TEXT, length, index), self._codec.text_bytes(size))
        ids = self._codec.encode_text(text, size)
        if len(ids) < size:
            raise ValueError(f"held-out text gave {len(ids)} tokens; {size} are needed")
        return Prompt(TEXT, length, index, ids, text_bytes=len(self._codec.decode(ids[1:])))

    def _random(self, task: str, length: int, index: int) -> random.Random:
        return random.Random(f"{self._seed} {task} {length} {index}")


def digest(text: corpus.Corpus | None) -> str:
    """Returns a digest that tells whether two evaluations drew their prompts from the same text."""
    whole = hashlib.sha256()
    for blob, weight in zip(text.blobs, text.weights) if text else ():
        whole.update(f"{weight} {len(blob)} ".encode() + blob)
    return whole.hexdigest()[:16] if text else ""


def load_text(trained_on: list[str], unseen: list[str]) -> corpus.Corpus | None:
    """Loads text that the model has not seen: the held-out part of the folders it was trained on, and all of the
    others.
    """
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
