"""A folder of texts as token ids, from which an evaluation on another machine needs nothing else.

  texts.json        what each text is: kind, package, files; and a digest of each array
  judging.npy       [texts, 32768] uint16; a text of fewer tokens is the beginning of one of these
  calibration.npy   the same, from other files: thresholds and head groups are chosen on these, never on the former
Kinds take turns, so that the first texts of an array are of all kinds. Needs numpy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LONGEST = 32768  # tokens
REPEAT = 12  # tokens
BETWEEN_DOCUMENTS = "\n\n"

Text = tuple[list[int], list[str]]  # token ids, names of documents


@dataclass(frozen=True)
class Texts:
    """The texts of one role. tokens: [texts, LONGEST] uint16; about: of each text its kind, package and files."""

    tokens: np.ndarray
    about: list[dict]
    digest: str

    def ids(self, index: int, length: int) -> list[int]:
        return self.tokens[index, :length].tolist()


def cut(documents: Sequence, encode: Callable[[str], list[int]], count: int, length: int) -> list[Text]:
    """Makes `count` texts of `length` tokens each, with the names of the documents in them.

    A text begins where a document begins, or, where documents are few and long, in the middle of one that fills it. No
    token is in two texts. Raises ValueError when the documents run out.
    """
    of_one = max(1, -(-count // len(documents)))  # texts that one document may end
    made, ids, names = [], [], []
    for document in documents:
        fresh = encode(document.text + BETWEEN_DOCUMENTS)[: of_one * length]
        while fresh and len(made) < count:
            taken, fresh = fresh[: length - len(ids)], fresh[length - len(ids) :]
            ids, names = ids + taken, [*names, document.name]
            if len(ids) == length:
                made.append((ids, names))
                ids, names = [], []
                fresh = fresh if len(fresh) >= length else []
    if len(made) < count:
        raise ValueError(f"the documents fill {len(made)} texts of {length} tokens; {count} are asked for")
    return made


def in_turns(groups: list[list]) -> list:
    """Deals out alternately from all groups, as even as their sizes allow: the first of each, then the second."""
    placed = [((i + 0.5) / len(group), g, item) for g, group in enumerate(groups) for i, item in enumerate(group)]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def parse_length(text: str) -> tuple[int, int]:
    """Turns 8192:48 into 48 texts of 8,192 tokens."""
    length, _, count = text.partition(":")
    if not (length.isdecimal() and count.isdecimal()) or not 0 < int(count) or not 1 < int(length) <= LONGEST:
        raise ValueError(f"length {text!r}; TOKENS:TEXTS with 2 to {LONGEST} tokens is expected")
    return int(length), int(count)


def ends_repeat(ids: list[int] | np.ndarray, length: int = REPEAT) -> np.ndarray:
    """Tells of each token whether it ends a run of `length` tokens that the text had before: [len(ids)] bool."""
    seen, marked = set(), np.zeros(len(ids), bool)
    ids = np.asarray(ids, np.uint16).tobytes()
    for end in range(length, len(marked) + 1):
        gram = ids[2 * (end - length) : 2 * end]
        marked[end - 1] = gram in seen
        seen.add(gram)
    return marked


def nats_by_sort(ids: list[int], nats: list[float] | np.ndarray) -> dict:
    """Sums the nats of every token but the first, [len(ids) - 1], over those that end a repeat and over all others."""
    nats, repeated = np.asarray(nats, np.float64), ends_repeat(ids)[1:]
    return {
        "tokens_repeated": int(repeated.sum()),
        "tokens_other": int((~repeated).sum()),
        "nats_repeated": round(float(nats[repeated].sum()), 4),
        "nats_other": round(float(nats[~repeated].sum()), 4),
    }


def shared_runs(one: np.ndarray, other: np.ndarray, length: int) -> int:
    """Counts the tokens in `other` that end a run of `length` tokens which some row of `one` has."""

    def grams(row: np.ndarray) -> list[bytes]:
        data = row.tobytes()
        return [data[2 * i : 2 * (i + length)] for i in range(len(row) - length + 1)]

    known = {gram for row in one for gram in grams(row)}
    return sum(gram in known for row in other for gram in grams(row))


def save(folder: Path, role: str, rows: list[tuple[list[int], dict]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.array([ids for ids, _ in rows], np.uint16)
    np.save(folder / f"{role}.npy", tokens)
    path = folder / "texts.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    held[role] = {"sha256": _digest(tokens), "texts": [about for _, about in rows]}
    path.write_text(json.dumps(held, indent=1) + "\n")


def load(folder: Path, role: str) -> Texts:
    """Raises ValueError when the array is not the one that texts.json describes."""
    tokens = np.load(folder / f"{role}.npy")
    held = json.loads((folder / "texts.json").read_text())[role]
    if (found := _digest(tokens)) != held["sha256"]:
        raise ValueError(f"{role}.npy has sha256 {found}; texts.json says {held['sha256']}")
    return Texts(tokens, held["texts"], held["sha256"])


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
