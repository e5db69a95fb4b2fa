"""Tests that the operator's guide tells the truth: its flags, its formulas and its commands.

    python_test.sh FOLDER guide_test.py build/release/bin
"""

import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from rendering import ROOT

try:
    from pods import MODEL, live_processes
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

GUIDE = ROOT / "deploy" / "guide" / "README.md"
PAGES = [ROOT / "deploy" / "README.md", GUIDE, ROOT / "deploy" / "security.md",
         *(ROOT / "deploy" / folder / "README.md" for folder in ("kubernetes", "alerts", "dashboards"))]  # fmt: skip
# A block of commands may need these, and is not run then.
NOT_RUN = {"cluster", "gpu"}
# These need Docker and a registry, a build tree, or a Prometheus. Another script of this folder does the same as such
# a block, and has the parts of it that the pattern finds.
RUN_ELSEWHERE = {
    "docker": ("image_test.sh", r"--target (\S+)"),
    "build": ("tarball_test.sh", r"\b(\w+\.sh)\b"),
    "prometheus": ("dashboards_picture.py", r"\b(\w+)\.py\b"),
}
CPU = {"e": 4, "tile": 2048}


def section(page, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


def blocks(page):
    """Yields (what its first line says, the text) of each block."""
    for info, text in re.findall(r"^```([^\n]*)\n(.*?)^```$", page, re.M | re.S):
        yield info.split(), text


def shape_of_the_model():
    config = json.loads((MODEL / "config.json").read_text())
    names = {"hidden": "hidden_size", "intermediate": "intermediate_size", "heads": "num_attention_heads",
             "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "layers": "num_hidden_layers"}  # fmt: skip
    return {ours: config[theirs] for ours, theirs in names.items()}


def parameters_of_the_model():
    total = 0
    for file in MODEL.glob("*.safetensors"):
        with file.open("rb") as weights:
            header = json.loads(weights.read(struct.unpack("<Q", weights.read(8))[0]))
        total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total


class Flags(unittest.TestCase):
    def test_the_guide_names_every_flag_and_no_other(self):
        told = subprocess.run([BIN_DIR / "prefilld", "--help"], capture_output=True, text=True).stdout
        flags = set(re.findall(r"^  (--[a-z_]+)  \(default", told, re.M))
        self.assertGreater(len(flags), 40)
        table = section(GUIDE.read_text(encoding="utf-8"), "Flags").split("| purpose | flags |")[1]
        named = re.findall(r"`(--[a-z_]+)`", table)
        self.assertEqual(sorted(named), sorted(flags))


class Running(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.programs = cls.enterClassContext(live_processes.Programs())

    def start(self, *flags):
        """Returns the address, and the sums that the log has."""
        flags = ("--device=cpu", "--log_format=json", "--metrics_listen=127.0.0.1:0", *flags)
        address = self.programs.start(BIN_DIR / "prefilld", MODEL, *flags)
        events = map(json.loads, self.programs.log(address).splitlines())
        (memory,) = [event for event in events if event["event"] == "memory"]
        return address, memory

    def formulas(self, **given):
        """Returns the values of the guide's own formulas."""
        (text,) = [text for info, text in blocks(GUIDE.read_text(encoding="utf-8")) if info == ["formulas"]]
        values = {**shape_of_the_model(), **CPU, **given}
        for line in text.splitlines():
            name, formula = line.split("=", 1)
            values[name.strip()] = eval(formula, {"ceil": math.ceil, "min": min, "max": max}, values)
        return values

    def test_formulas_of_memory_agree_with_the_log(self):
        weights = parameters_of_the_model() * CPU["e"]
        short = 4096
        for tokens in (8192, 32768):
            _, memory = self.start(f"--max_prompt_tokens={tokens}")
            expected = weights + sum(self.formulas(tokens=t)["place"] for t in (tokens, short, short))
            expected += sum(self.formulas(tokens=t)["workspace"] for t in (tokens, short))
            self.assertEqual(memory["resident_tokens"], tokens + 2 * short)
            print(f"{tokens} tokens: {memory['device_bytes']} bytes, by the formulas {expected}", file=sys.stderr)
            self.assertAlmostEqual(memory["device_bytes"] / expected, 1, delta=0.05)

    def test_formulas_of_memory_agree_with_what_a_gpu_had(self):
        kept = json.loads((ROOT / "tests/gpu/results/h200/long_states.json").read_text())
        measured = kept["half of the time of a layer"]
        gpu = {"e": 2, "tile": 8192, "hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "head_dim": 128}
        parameters, long, short, interjecting = 7_615_616_512, 1_000_000, 8192, 4096
        places = [long, long, *[short] * 8]
        self.assertEqual(measured["resident_tokens_limit"], sum(places))
        expected = parameters * gpu["e"] + sum(self.formulas(**gpu, tokens=t)["place"] for t in places)
        expected += self.formulas(**gpu, tokens=long)["workspace"]
        expected += self.formulas(**{**gpu, "tile": 2048}, tokens=interjecting)["workspace"]
        in_use = measured["device_mib_ready"]
        print(f"an H200 had {in_use} MiB in use, by the formulas {expected / 2**20:.0f}", file=sys.stderr)
        self.assertAlmostEqual(in_use * 2**20 / expected, 1, delta=0.05)

    def test_a_further_place_takes_what_the_formula_says(self):
        tokens, one = 8192, 8192 + 2 * 4096
        _, before = self.start(f"--max_prompt_tokens={tokens}", f"--max_resident_tokens={one}")
        _, after = self.start(f"--max_prompt_tokens={tokens}", f"--max_resident_tokens={one + tokens}")
        self.assertEqual(after["resident_tokens"] - before["resident_tokens"], tokens)
        place = self.formulas(tokens=tokens)["place"]
        # Beside it are the patterns of head groups, a few kilobytes each.
        self.assertAlmostEqual((after["device_bytes"] - before["device_bytes"]) / place, 1, delta=0.01)

    def test_the_prefix_cache_takes_what_the_formula_says(self):
        asked = 100_000_000
        _, memory = self.start("--max_prompt_tokens=1024", f"--prefix_cache_bytes={asked}", "--staging_bytes=16777216")
        token = self.formulas(tokens=1)["kv_token"]
        self.assertEqual(memory["prefix_cache_bytes"], memory["prefix_cache_tokens"] * token)
        self.assertLess(asked - memory["prefix_cache_bytes"], 128 * token)
        self.assertEqual(memory["staging_bytes"], 16777216)

    def test_commands_run(self):
        address, _ = self.start("--max_prompt_tokens=1024")
        process = self.programs.process_at(address)
        environment = {**os.environ, "PATH": f"{BIN_DIR}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                       "SERVER": address, "METRICS": self.programs.metrics_address(address),
                       "PREFILLD_PID": str(process.pid)}  # fmt: skip
        ran = 0
        for page in PAGES:
            for info, commands in blocks(page.read_text(encoding="utf-8")):
                commanding = re.search(r"^(docker|kubectl|build/\S+|deploy/\S+|prefill\S*|python3|curl|kill) ", commands, re.M)
                self.assertEqual(bool(commanding), info[:1] == ["sh"], commands)
                if info == ["sh"]:
                    with self.subTest(commands):
                        done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=ROOT, env=environment,
                                              capture_output=True, text=True, timeout=120)  # fmt: skip
                        self.assertEqual(done.returncode, 0, done.stderr)
                        ran += 1
                elif info[:1] == ["sh"] and info[1] in RUN_ELSEWHERE:
                    test, pattern = RUN_ELSEWHERE[info[1]]
                    parts = re.findall(pattern, commands)
                    self.assertTrue(parts, commands)
                    for part in parts:
                        self.assertRegex((Path(__file__).parent / test).read_text(), rf"\b{re.escape(part)}\b")
                elif info[:1] == ["sh"]:
                    self.assertIn(info[1], NOT_RUN)
        self.assertGreaterEqual(ran, 4)
        self.assertIsNone(process.poll())


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
