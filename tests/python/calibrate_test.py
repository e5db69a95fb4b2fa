#!/usr/bin/env python3
"""Tests calibration by loss: the search on made-up losses, and the command with prefilld over the embedded model.

calibrate_test.py FOLDER_OF_PROGRAMS. Needs the Python client's packages (grpcio, protobuf, numpy, xxhash); without
them the script exits with 77, skipped.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "model" / "tiny"
sys.path.insert(0, str(ROOT / "model" / "calibration"))
import calibrate  # noqa: E402
import loss_search  # noqa: E402
import served_runs  # noqa: E402
from loss_search import Loss, Prompt  # noqa: E402

try:
    import google.protobuf  # noqa: F401
    import grpc  # noqa: F401
    import numpy  # noqa: F401
    import xxhash  # noqa: F401
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

PROGRAMS = Path(sys.argv.pop()) if len(sys.argv) > 1 else None


def lost(*nats: float) -> Loss:
    return Loss(nats, 0.5)


class Search(unittest.TestCase):
    def sparsest(self, means: list[float], rise: float, spread: float = 0.0) -> int | None:
        self.asked = []

        def chosen_on(index: int) -> Loss:
            self.asked.append(index)
            return lost(means[index] - spread, means[index] + spread)

        return loss_search.sparsest(len(means), chosen_on, rise)

    def test_the_sparsest_that_keeps_the_promise_is_found_by_halving(self):
        means = [0.001 * i for i in range(16)]
        self.assertEqual(self.sparsest(means, 0.01), 7)  # 0.008 and more is within the margin of 0.00995
        self.assertLessEqual(len(self.asked), 5)
        self.assertEqual(self.sparsest(means, 0.05), 15)
        self.assertEqual(self.sparsest([0.02, 0.03], 0.01), None)
        self.assertEqual(self.sparsest([0.0], 0.01), 0)

    def test_an_uncertain_loss_counts_as_more(self):
        means = [0.001 * i for i in range(16)]
        self.assertEqual(self.sparsest(means, 0.01, spread=0.003), 4)

    def test_what_judges_differently_gives_way_to_denser_ones(self):
        means = [0.001, 0.005, 0.02, 0.03]
        judged_on = lambda index: lost(means[index], means[index])  # noqa: E731
        self.assertEqual(loss_search.confirmed(3, judged_on, 0.01), (1, 3))
        self.assertEqual(loss_search.confirmed(1, judged_on, 0.01), (1, 1))
        self.assertEqual(loss_search.confirmed(3, judged_on, 0.0005), (None, 4))

    def test_a_loss_is_told_as_a_rise_of_perplexity(self):
        told = lost(math.log(1.01), math.log(1.03)).described()
        self.assertAlmostEqual(told["perplexity_rise"], math.sqrt(1.01 * 1.03) - 1, places=5)
        self.assertEqual((told["worst_prompt"], told["prompts"]), (0.03, 2))


class Split(unittest.TestCase):
    def prompts(self, **counts: int) -> list[Prompt]:
        return [Prompt(f"{d}{i}", d, tuple(range(2 + i))) for d, count in counts.items() for i in range(count)]

    def test_each_domain_and_length_is_on_both_sides_and_no_prompt_is(self):
        choosing, judging = loss_search.split(self.prompts(prose=4, code=5))
        self.assertEqual([p.name for p in choosing], ["code0", "code2", "code4", "prose0", "prose2"])
        self.assertEqual([p.name for p in judging], ["code1", "code3", "prose1", "prose3"])

    def test_too_few_prompts_are_refused(self):
        with self.assertRaisesRegex(ValueError, "'code' has one prompt"):
            loss_search.split(self.prompts(prose=4, code=1))
        with self.assertRaisesRegex(ValueError, "3 prompts; at least four"):
            loss_search.split(self.prompts(prose=3))


class Input(unittest.TestCase):
    def test_candidates_are_lines_of_thresholds(self):
        self.assertEqual(calibrate.parse_candidate("gamma=0.9, min_budget_tokens=64"),
                         {"gamma": 0.9, "min_budget_tokens": 64})  # fmt: skip
        with self.assertRaisesRegex(ValueError, "'gamma' is not NAME=NUMBER"):
            calibrate.parse_candidate("gamma")

    def test_prompts_are_read_as_the_recorder_reads_them(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "code"
            folder.mkdir()
            (folder / "a.json").write_text("[1, 2, 3]")
            (folder / "b.json").write_text('{"token_ids": [4, 5], "domain": "other"}')
            (folder / "c.txt").write_text("hi")
            (folder / "d.md").write_text("not a prompt")
            made = {Path(p.name).name: (p.domain, p.tokens) for p in calibrate.read_prompts([Path(name)], 256)}
            self.assertEqual(made, {"a.json": ("code", (1, 2, 3)), "b.json": ("other", (4, 5)),
                                    "c.txt": ("code", (256, 104, 105))})  # fmt: skip
            (folder / "a.json").write_text('["x"]')
            with self.assertRaisesRegex(ValueError, "a.json: no list of token ids"):
                calibrate.read_prompts([folder], None)


@unittest.skipUnless(PROGRAMS and (PROGRAMS / "prefilld").exists(), "prefilld is not built")
class Served(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        text = (ROOT / "LICENSE").read_bytes()
        (self.folder / "licence").mkdir()
        for i in range(4):
            (self.folder / "licence" / f"{i}.txt").write_bytes(text[2500 * i : 2500 * i + 2047])
        (self.folder / "candidates").write_text(
            "score_threshold=0.99\nscore_threshold=0.9\nscore_threshold=0.5\n"
            "score_threshold=0.05,last_rows_gamma=0.01,min_budget_tokens=1\n"
        )
        self.out = self.folder / "head_clusters.json"

    def calibrate(self, rise: float) -> subprocess.CompletedProcess:
        command = [sys.executable, "-B", calibrate.__file__, "--prefilld", PROGRAMS / "prefilld", "--model", TINY,
                   "--device", "cpu", "--out", self.out, "--candidates", self.folder / "candidates",
                   f"--max_perplexity_rise={rise}", self.folder / "licence"]  # fmt: skip
        return subprocess.run(command, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, capture_output=True, text=True)

    def test_the_file_keeps_its_promise_and_is_served(self):
        done = self.calibrate(0.02)
        self.assertEqual(done.returncode, 0, done.stderr)
        written = json.loads(self.out.read_text())
        self.assertLessEqual(written["calibration"]["measured"]["perplexity_rise"], 0.02)
        self.assertEqual(written["calibration"]["prompts"], {"licence": 4})
        self.assertLess(written["thresholds"]["score_threshold"], 0.99)
        self.assertGreater(written["thresholds"]["score_threshold"], 0.05)
        with served_runs.Server(PROGRAMS / "prefilld", TINY, "cpu", 2048).serving(self.out) as address:
            self.assertEqual(calibrate.fingerprint_of(address), written["model_fingerprint"])
        again = self.calibrate(0.02)  # nothing is measured again
        self.assertEqual((again.returncode, again.stdout, again.stderr), (0, done.stdout, ""))

    def test_what_nothing_keeps_is_said_and_not_written(self):
        (self.folder / "candidates").write_text("score_threshold=0.05,last_rows_gamma=0.01,min_budget_tokens=1\n")
        done = self.calibrate(0.0001)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("--policy=dense", done.stdout)
        self.assertFalse(self.out.exists())


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
