#!/usr/bin/env python3
"""Writes calibration prompts: retrieval tasks and plain text, a folder per domain.

    make_prompts.py --out PROMPTS --length 8192 --text prose=DOCS code=SOURCES
    make_prompts.py --out PROMPTS --length 32768 --text prose=DOCS code=SOURCES --tokenizer MODEL

Without --tokenizer a prompt is a .txt for the embedded model, one token per byte. With it (a folder with
tokenizer.json; needs the package tokenizers) a prompt is a .json with token ids, at most and nearly --length of them.
Prompts of your own, from the traffic you serve, are better than these: any .json list of token ids will do.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny"))
import corpus  # noqa: E402
import tasks  # noqa: E402

RETRIEVAL = ("pass_key", "key_value")
BYTES_PER_TOKEN = 4.0  # where the search for a length begins
ATTEMPTS = 8


def text_of(blob: bytes, rng: random.Random, size: int) -> bytes:
    if len(blob) < size:
        raise ValueError(f"a text of {len(blob)} bytes is too short for a prompt of {size}")
    start = rng.randrange(len(blob) - size + 1)
    return blob[start : start + size].replace(bytes([corpus.END_OF_FILE]), b"\n")


def with_tokenizer(folder: Path, bytes_of_size, length: int) -> list[int]:
    """Returns at most `length` ids, and nearly as many, of the text that bytes_of_size(bytes) gives."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size, best = int(length * BYTES_PER_TOKEN), []
    for _ in range(ATTEMPTS):
        ids = tokenizer.encode(bytes_of_size(size).decode(errors="replace")).ids
        if len(best) < len(ids) <= length:
            best = ids
        if 0.99 * length <= len(ids) <= length:
            break
        size = int(size * 0.995 * length / len(ids))
    if not best:
        raise ValueError(f"found no prompt of {length} tokens")
    return best


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument("--text", nargs="+", required=True, metavar="DOMAIN=FOLDER", help="text files below the folder")
    parser.add_argument("--prompts", type=int, default=6, help="per domain")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; none: bytes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held_out", action="store_true",
                        help="take only the one file in forty that the embedded model has not seen in training")  # fmt: skip
    args = parser.parse_args()
    for entry in args.text:
        if "=" not in entry:
            parser.error(f"--text {entry!r} is not DOMAIN=FOLDER")
    return args


def make_prompts(args: argparse.Namespace) -> None:
    texts = dict(entry.split("=", 1) for entry in args.text)
    part = True if args.held_out else None
    blobs = {domain: corpus.load([folder], part).blobs[0] for domain, folder in texts.items()}
    filler = corpus.Corpus(list(blobs.values()), [1.0] * len(blobs)).filler
    for domain in (*RETRIEVAL, *blobs):
        (args.out / domain).mkdir(parents=True, exist_ok=True)
        for index in range(args.prompts):

            def bytes_of_size(size: int, domain=domain, index=index) -> bytes:
                rng = random.Random(f"{args.seed} {domain} {index}")
                if domain in blobs:
                    return text_of(blobs[domain], rng, size - 1)
                return tasks.make(domain, rng, size, tasks.sentence_filler if index % 2 else filler).prompt

            file = args.out / domain / f"{index:02}"
            if args.tokenizer:
                ids = with_tokenizer(args.tokenizer, bytes_of_size, args.length)
                file.with_suffix(".json").write_text(json.dumps({"domain": domain, "token_ids": ids}))
            else:
                file.with_suffix(".txt").write_bytes(bytes_of_size(args.length))


if __name__ == "__main__":
    try:
        make_prompts(read_arguments())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"make_prompts.py: {error}")
