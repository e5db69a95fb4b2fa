"""Runs the Python client's examples with a prefilld and a decode worker of this build.

    python3 tests/python/examples_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

MODEL = live_processes.MODEL
LAYERS, KV_BYTES = 8, 8 * 2 * 2 * 64 * 4  # of a token of the embedded model


class Examples(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.programs = cls.enterClassContext(live_processes.Programs())

    def run_example(self, name, *flags):
        command = [sys.executable, "-B", ROOT / "client" / "python" / "examples" / name, *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "client" / "python")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_a_text_is_prefilled_and_continued(self):
        server = self.programs.start(BIN_DIR / "prefilld", MODEL, "--metrics_listen=")
        worker = self.programs.start(BIN_DIR / "prefilld-decode-worker", MODEL, f"--prefill_address={server}")
        flags = ("--server", server, "--worker", worker, "--model", str(MODEL), "--text", "The lighthouse keeper ")
        *lines, first, text = self.run_example("prefill_and_generate.py", *flags).splitlines()[:LAYERS + 3]
        self.assertEqual([re.search(r"layer (\d+)", line)[1] for line in lines[1:]], [str(i) for i in range(LAYERS)])
        self.assertRegex(first, r"^first token \d+, density 1.000")
        self.assertTrue(text)

    def test_many_prompts_are_prefilled_by_a_server_that_refuses_some(self):
        server = self.programs.start(BIN_DIR / "prefilld", MODEL, "--metrics_listen=127.0.0.1:0", "--queue_capacity=1")
        flags = ("--servers", server, "--prompts=8", "--tokens=300", "--at_once=8", "--tries=100")
        lines = self.run_example("prefill_many.py", *flags).splitlines()
        numbers = sorted(int(re.search(r"prompt (\d+): 300 tokens, (\d+) bytes", line)[1]) for line in lines)
        self.assertEqual(numbers, list(range(8)))
        blocks = -(-300 // 64) * 64  # tokens behind the prompt's end are zero
        self.assertTrue(all(f"{blocks * KV_BYTES} bytes" in line for line in lines), lines)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
