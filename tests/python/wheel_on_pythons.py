#!/usr/bin/env python3
"""Installs the Python client's wheel in empty virtual environments of several Pythons, and runs the README's lines there.

    python3 tests/python/wheel_on_pythons.py build/release/bin --out tests/python/wheel_results.json python3.10 python3.13

For each Python: pip builds the wheel from a copy of client/python and installs it, with what it asks for, in an
environment that has nothing else; then the Python lines of README.md and of client/README.md run beside a prefilld
with the embedded model. Packages come from pip's index. Exits with 1 if anything fails; what ran before stays in --out.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "client" / "python"
sys.path[:0] = [str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

# The READMEs leave this to the reader, before their lines, and this must be so after them.
READER = """
import asyncio

class Cache:
    def __init__(self):
        self.stored = []

    def store(self, layer, first_block, keys, values):
        assert keys.shape == values.shape and keys.dtype == values.dtype
        self.stored.append((layer, first_block, keys.shape[0]))

tokens, cache = [256, *b"The lighthouse keeper " * 40], Cache()
"""
BLOCKING = """
blocks = -(-len(tokens) // 64)
assert sum(count for _, _, count in cache.stored) == 8 * blocks, cache.stored
assert {layer for layer, _, _ in cache.stored} == set(range(8))
"""
ASYNCIO = """
async def read():
    from prefilld import AsyncPrefillClient
    seen = set()
%s                seen.add(blocks.layer)
    assert seen == set(range(8)), seen

asyncio.run(read())
"""
VERSIONS = """
import importlib.metadata as m, json, platform
names = ("prefilld", "grpcio", "protobuf", "numpy", "xxhash")
print(json.dumps({"python": platform.python_version(), **{n: m.version(n) for n in names}}))
"""


def lines_of(readme: Path, begin: str) -> str:
    """Returns the block of Python that begins with this line."""
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(begin))


def program(address: str) -> str:
    blocking = lines_of(ROOT / "README.md", "from prefilld import Attention")
    blocking = blocking.replace("localhost:50051", address)
    at_once = lines_of(ROOT / "client" / "README.md", "async with AsyncPrefillClient")
    at_once = at_once.replace('["10.0.0.1:50051", "10.0.0.2:50051"]', f'["{address}"]')
    # torch is an extra; the lines name the arrays as the other way.
    at_once = at_once.replace("blocks.torch()", "blocks.keys, blocks.values")
    return READER + blocking + BLOCKING + ASYNCIO % "".join(f"    {line}\n" for line in at_once.splitlines())


def run(*command, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check(python: str, address: str) -> dict:
    with tempfile.TemporaryDirectory(prefix="prefilld-wheel-") as name:
        folder = Path(name)
        shutil.copytree(CLIENT, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "*.binpb"))
        for environment in ("building", "empty"):
            run(python, "-m", "venv", folder / environment, cwd=folder)
        pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
        run(folder / "building/bin/python", *pip, "wheel", "--no-deps", "-w", folder / "wheels", folder / "source", cwd=folder)
        (wheel,) = (folder / "wheels").iterdir()
        empty = folder / "empty" / "bin" / "python"
        run(empty, *pip, "install", wheel, cwd=folder)
        printed = run(empty, "-c", program(address), cwd=folder)
        return json.loads(run(empty, "-c", VERSIONS, cwd=folder)) | {"wheel": wheel.name, "printed": printed.strip()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin_dir", type=Path, help="folder of the programs of a build")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("pythons", nargs="+")
    args = parser.parse_args()
    commit = run("git", "rev-parse", "--short=12", "HEAD", cwd=ROOT).strip()
    results, failed = {"commit": commit, "ran": []}, 0
    with live_processes.Programs() as programs:
        address = programs.start(args.bin_dir.resolve() / "prefilld", live_processes.MODEL, "--metrics_listen=")
        for python in args.pythons:
            try:
                results["ran"].append(check(python, address))
                print(f"{python}: {results['ran'][-1]['printed']}", flush=True)
            except (OSError, RuntimeError) as error:
                failed += 1
                print(f"{python} failed: {error}", file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
