"""Loads text folders as one byte string each, for training and for held-out evaluation.

A source is `FOLDER` or `FOLDER:WEIGHT`; the weight says how often text is drawn from it. One file in forty, chosen by a
hash of its contents, is held out, so that training and evaluation agree on the split on any machine.
"""

from __future__ import annotations

import random
import zlib
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

END_OF_FILE = 0xFF  # never part of UTF-8; training turns it into EOS
SUFFIXES = {"", ".md", ".py", ".rst", ".txt"}
MAX_FILE_BYTES = 1_000_000  # larger ones are mostly tables
HELD_OUT_ONE_IN = 40


def _readable(data: bytes) -> bool:
    """Tells whether a file is mostly ASCII prose or source, without tables of numbers and minified lines."""
    if len(data) < 300 or b"\x00" in data:
        return False
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    letters = sum(data.count(c) for c in b"abcdefghijklmnopqrstuvwxyz ")
    return letters > 0.6 * len(data) and len(text) > 0.95 * len(data) and data.count(b"\n") > len(data) / 400


@dataclass
class Corpus:
    blobs: list[bytes]
    weights: list[float]

    def __post_init__(self) -> None:
        self._cumulative = list(accumulate(self.weights))

    def blob(self, rng: random.Random) -> bytes:
        return self.blobs[bisect(self._cumulative, rng.random() * self._cumulative[-1])]

    def chunk(self, rng: random.Random, size: int) -> bytes:
        """Returns `size` bytes from anywhere, sometimes from the start of a file. END_OF_FILE separates files."""
        blob = self.blob(rng)
        start = int(rng.random() * max(1, len(blob) - size))
        if rng.random() < 0.3:
            start = blob.find(END_OF_FILE, start, len(blob) - size) + 1 or start
        chunk = blob[start : start + size]
        return chunk if len(chunk) == size else chunk + self.chunk(rng, size - len(chunk))

    def filler(self, rng: random.Random, size: int) -> bytes:
        return self.chunk(rng, size).replace(bytes([END_OF_FILE]), b"\n")


def load(sources: list[str], held_out: bool | None = False) -> Corpus:
    """Reads the part that is held out, or the other one; None: all files. Raises ValueError if no file is readable."""
    blobs, weights = [], []
    for source in sources:
        folder, _, weight = source.partition(":")
        if not Path(folder).is_dir():
            raise ValueError(f"text source {source!r} is no folder")
        files = sorted(Path(folder).rglob("*"))
        kept = []
        for file in files:
            if file.suffix.lower() not in SUFFIXES or not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
                continue
            data = file.read_bytes()
            part = zlib.crc32(data) % HELD_OUT_ONE_IN == 0
            if held_out in (None, part) and _readable(data):
                kept.append(data)
        # The same file often lies in several packages. A random order separates neighbours that are alike.
        kept = sorted(set(kept), key=zlib.adler32)
        if kept:
            blobs.append(bytes([END_OF_FILE]).join(kept) + bytes([END_OF_FILE]))
            weights.append(float(weight or 1))
    if not blobs:
        part = {None: "", False: " that is not held out", True: " among the one file in forty that is held out"}[held_out]
        raise ValueError(f"no readable text under {', '.join(sources)}{part}")
    return Corpus(blobs, weights)
