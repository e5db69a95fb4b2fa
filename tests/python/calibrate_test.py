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
import time
import unittest
import urllib.request
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
    return Loss(nats, (4096,) * len(nats), 0.5)


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

    def test_the_rise_is_that_of_the_length_at_which_it_is_greatest(self):
        loss = Loss((0.001, 0.03, 0.01, 0.003), (4000, 8192, 8000, 4096), 0.5)
        self.assertEqual([*loss.rises], [4096, 8192])
        self.assertAlmostEqual(loss.rise, math.expm1(0.02))
        self.assertAlmostEqual(loss.described()["perplexity_rise_by_tokens"]["4096"], math.expm1(0.002), places=5)


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

    def test_every_threshold_of_the_own_candidates_falls_and_the_least_budget_to_nothing(self):
        candidates = calibrate.read_candidates(None)
        for name in ("score_threshold", "last_rows_gamma", "min_budget_tokens"):
            values = [candidate[name] for candidate in candidates]
            self.assertEqual(values, sorted(values, reverse=True), name)
        self.assertEqual(candidates[-1]["min_budget_tokens"], 0)
        self.assertEqual(len({str(candidate) for candidate in candidates}), len(candidates))

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

    def make_prompts(self, folder: Path, *more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-B", ROOT / "model" / "calibration" / "make_prompts.py", "--out", folder / "made",
                   "--length", "400", "--prompts", "2", "--text", f"notes={folder / 'notes'}", *more]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True)

    def test_prompts_are_made_of_all_files_and_a_folder_without_text_is_named(self):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "notes").mkdir()
            done = self.make_prompts(folder)
            self.assertEqual(done.returncode, 1)
            self.assertEqual(done.stderr, f"make_prompts.py: no readable text under {folder / 'notes'}\n")
            (folder / "notes" / "a.txt").write_text("a clerk counted the keys in every drawer\n" * 20)
            done = self.make_prompts(folder)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("counted the keys", (folder / "made" / "notes" / "01.txt").read_text())
            done = self.make_prompts(folder, "--held_out")  # this file is not the one in forty
            self.assertRegex(done.stderr, "^make_prompts.py: no readable text .* among the one file in forty")


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
        self.assertEqual(written["calibration"]["longest_tokens"], 2048)
        self.check_what_is_served(written)
        again = self.calibrate(0.02)  # nothing is measured again
        self.assertEqual((again.returncode, again.stdout, again.stderr), (0, done.stdout, ""))

    def check_what_is_served(self, written: dict) -> None:
        """Serves the file: the promise is logged and exported, and a prompt too long for it runs without the file's
        thresholds.
        """
        ports, log = self.folder / "ports", self.folder / "log"
        command = [PROGRAMS / "prefilld", f"--model={TINY}", f"--clusters={self.out}", "--device=cpu", "--listen=127.0.0.1:0",
                   "--max_prompt_tokens=4096", "--metrics_listen=127.0.0.1:0", f"--port_file={ports}"]  # fmt: skip
        with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as served:
            try:
                while not ports.exists():
                    self.assertIsNone(served.poll(), log.read_text())
                    time.sleep(0.05)
                port = dict(line.split("=") for line in ports.read_text().split())
                address = f"127.0.0.1:{port['grpc']}"
                self.assertEqual(calibrate.fingerprint_of(address), written["model_fingerprint"])
                text = list((ROOT / "LICENSE").read_bytes()[:2700])
                one_length = lambda tokens: served_runs.measure("", "share", address, {len(tokens): [tokens]})  # noqa: E731
                within, beyond = one_length(text[:2500]), one_length(text)
                self.assertGreater(beyond["density"]["2700"], within["density"]["2500"])  # the built-in ones compute more
                with urllib.request.urlopen(f"http://127.0.0.1:{port['metrics']}/metrics") as page:
                    metrics = page.read().decode()
            finally:
                served.terminate()
        measured = written["calibration"]["measured"]["perplexity_rise"]
        self.assertRegex(metrics, r'prefilld_calibrated_perplexity_rise\{kind="promised"\} 0\.02\n')
        self.assertRegex(metrics, rf'prefilld_calibrated_perplexity_rise\{{kind="measured"\}} {measured}\n')
        self.assertRegex(metrics, r"prefilld_calibrated_prompt_tokens 2560\n")
        self.assertRegex(metrics, r"prefilld_beyond_calibration_requests_total 1\n")
        logged = log.read_text()
        self.assertRegex(logged, r"calibrated_loss .*promised_perplexity_rise=0\.02 .*holds_up_to_tokens=2560")
        self.assertRegex(logged, r"tokens=2700 .*beyond_calibration=yes")
        self.assertNotRegex(logged, r"tokens=2500 .*beyond_calibration")

    def test_what_nothing_keeps_is_said_and_not_written(self):
        (self.folder / "candidates").write_text("score_threshold=0.05,last_rows_gamma=0.01,min_budget_tokens=1\n")
        done = self.calibrate(0.0001)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("--policy=dense", done.stdout)
        self.assertFalse(self.out.exists())


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
