#!/usr/bin/env python3
"""Compares prefilld with the installed transformers, now, on checkpoints that transformers saved.

    python3 tests/python/live_comparison.py build/release/tests/model/golden_test [--device=cuda]

The committed goldens answer "does prefilld still compute what it did"; this answers "does it agree
with the transformers of today", in the files it writes as well as in what it computes.
"""

import pathlib
import subprocess
import sys
import tempfile

import make_goldens


def main():
    golden_test, *flags = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="prefilld-goldens-") as folder:
        make_goldens.write_all(pathlib.Path(folder), save_checkpoints=True)
        sys.exit(subprocess.run([golden_test, f"--goldens={folder}", *flags]).returncode)


if __name__ == "__main__":
    main()
