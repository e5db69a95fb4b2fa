"""Tests evaluate.py against real processes of this build.

    python3 tests/evaluation/evaluate_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the client's packages or the weights of model/tiny.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import live_processes

SKIPPED = live_processes.reason_to_skip()
if SKIPPED:
    print(f"skipped: {SKIPPED}")
    sys.exit(77)

CLIENT = live_processes.ROOT / "client" / "python"


class Evaluation(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.processes = cls.enterClassContext(live_processes.LiveProcesses(BIN_DIR))

    def evaluate(self, out, *arguments, until=None):
        """Runs evaluate.py, and sends it Ctrl-C once until() holds."""
        command = [sys.executable, "-B", Path(__file__).with_name("evaluate.py"), "--out", out,
                   "--server", self.processes.server, "--worker", self.processes.worker, *arguments]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(CLIENT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            while until and not until() and process.poll() is None:
                time.sleep(0.02)
            if until:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all its processes
            out, error = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, error)

    def test_scores_every_setting_and_resumes(self):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results"
            few = ("--tasks", "pass_key", "pass_key_within", "interleaved", "text", "--lengths", "700", "9000000",
                   "--prompts", "2", "--depths", "2", "--settings", "dense", "share:gamma=0.9",
                   "--unseen_text", str(live_processes.MODEL))  # fmt: skip
            first = self.evaluate(out, *few)
            self.assertEqual(first.returncode, 0, first.stderr)
            self.assertIn("left out: 9000000 tokens", first.stderr)
            summary = json.loads((out / "summary.json").read_text())
            found = {(c["setting"], c["task"]) for c in summary["tasks"] if c["score"]["value"] > 0.9}
            tasks = ("pass_key", "pass_key_within", "interleaved")
            self.assertEqual(found, {(s, t) for s in ("dense", "share:gamma=0.9") for t in tasks})
            for cell in summary["text"]:
                self.assertEqual(cell["prompts"], 2)
                self.assertTrue(1 < cell["bits_per_byte"] < 6, cell)
            again = self.evaluate(out, *few)
            self.assertIn("16 of 16 prompts were done before", again.stderr)
            self.assertEqual(json.loads((out / "summary.json").read_text()), summary)
            other = self.evaluate(out, *few, "--seed", "2")
            self.assertEqual(other.returncode, 1)
            self.assertIn("seed", other.stderr)

    def test_when_interrupted_keeps_what_is_finished(self):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results"
            many = ("--tasks", "pass_key_within", "--lengths", "700", "--prompts", "5000", "--settings", "dense")
            journal = out / "results.jsonl"
            run = self.evaluate(out, *many, until=lambda: journal.exists() and journal.stat().st_size)
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertIn("goes on later", run.stderr)
            done = len(journal.read_text().splitlines())
            self.assertTrue(1 <= done < 5_000)
            cells = json.loads((out / "summary.json").read_text())["tasks"]
            self.assertEqual(sum(c["prompts"] for c in cells), done)

    def test_a_refused_request_ends_it_and_says_why(self):
        with tempfile.TemporaryDirectory() as folder:
            for task in ("pass_key", "pass_key_within"):
                few = ("--tasks", task, "--lengths", "700", "--prompts", "1", "--settings", "share:gamma=7")
                run = self.evaluate(Path(folder) / task, *few)
                self.assertEqual(run.returncode, 1)
                self.assertRegex(run.stderr, "INVALID_ARGUMENT.*gamma")


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
