"""Tests compare.py. Standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import compare

SUBJECT = {"model_fingerprint": "m", "device": "cpu", "seed": 1, "depths": 11, "asked_within": [0.35, 0.9],
           "text": [], "text_digest": ""}  # fmt: skip


def answered(index: int, right: bool, density: float = 0.25, **other) -> dict:
    return {"setting": "share", "task": "pass_key", "length": 8192, "index": index, "depth": 0.5, "answer": "1",
            "right": right, "generated": "1" if right else "2", "density": density, **other}  # fmt: skip


class Comparing(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)

    def folder(self, name: str, records: list[dict], **subject) -> Path:
        path = self.root / name
        path.mkdir()
        (path / "subject.json").write_text(json.dumps({**SUBJECT, **subject}))
        (path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    def summary(self, name: str, right: int, count: int, density: float) -> Path:
        score = compare.intervals.proportion(right, count).rounded()
        cell = {"setting": "share", "task": "pass_key", "length": 8192, "prompts": count, "score": score,
                "density": density}  # fmt: skip
        path = self.root / name
        path.write_text(json.dumps({"model_fingerprint": "m", "device": "gpu", "seed": 1, "tasks": [cell]}))
        return path

    def rows(self, first: Path, second: Path) -> list[compare.Row]:
        return compare.compare(compare.load(first), compare.load(second))

    def test_the_same_answers_agree(self):
        records = [answered(i, i != 3) for i in range(20)]
        (row,) = self.rows(self.folder("a", records), self.folder("b", records, device="gpu"))
        self.assertEqual((row.first, row.second, row.same_answers, row.prompts), (0.95, 0.95, 1.0, 20))
        self.assertTrue(row.agrees(0.01))

    def test_prompts_are_compared_one_by_one(self):
        first = [answered(i, i < 10) for i in range(20)]
        second = [answered(i, i >= 10) for i in range(20)]
        (row,) = self.rows(self.folder("a", first), self.folder("b", second))
        self.assertEqual((row.difference.value, row.same_answers), (0.0, 0.0))

    def test_only_prompts_that_both_have_count(self):
        first = [answered(i, True) for i in range(20)] + [answered(i, False) for i in range(20, 40)]
        (row,) = self.rows(self.folder("a", first), self.folder("b", [answered(i, True) for i in range(20)]))
        self.assertEqual((row.prompts, row.first), (20, 1.0))

    def test_answers_lost_on_one_side_differ(self):
        first = [answered(i, True) for i in range(40)]
        second = [answered(i, i >= 8) for i in range(40)]
        (row,) = self.rows(self.folder("a", first), self.folder("b", second))
        self.assertGreater(row.difference.low, 0)
        self.assertFalse(row.agrees(0.01))

    def test_a_density_apart_differs(self):
        first = [answered(i, True, 0.25) for i in range(20)]
        second = [answered(i, True, 0.262) for i in range(20)]
        (row,) = self.rows(self.folder("a", first), self.folder("b", second))
        self.assertAlmostEqual(row.density_difference, -0.012)
        self.assertFalse(row.agrees(0.01))
        self.assertTrue(row.agrees(0.02))

    def test_text_is_compared_in_nats(self):
        def text(index: int, nats: float) -> dict:
            return answered(index, False, task="text", depth=None, nats=[nats * 5] * 8, part_tokens=[5] * 8, bytes=40)

        first = [text(i, 1.0 + i / 10) for i in range(20)]
        second = [text(i, 1.2 + i / 10 - i / 1e4) for i in range(20)]
        (row,) = self.rows(self.folder("a", first), self.folder("b", second))
        self.assertAlmostEqual(row.difference.value, -0.2, places=2)
        self.assertFalse(row.agrees(0.01))

    def test_answers_within_a_prompt_are_compared_by_what_was_right(self):
        def within(index: int, right: int) -> dict:
            record = answered(index, False, task="interleaved", depth=None, asked=10)
            del record["generated"]
            return {**record, "right": right}

        first, second = [within(i, 9) for i in range(20)], [within(i, 9 - i % 2) for i in range(20)]
        (row,) = self.rows(self.folder("a", first), self.folder("b", second))
        self.assertAlmostEqual(row.first, 0.9)
        self.assertAlmostEqual(row.difference.value, 0.05)
        self.assertGreater(row.difference.low, 0)
        self.assertIsNone(row.same_answers)

    def test_beside_a_summary_intervals_are_wider(self):
        first = self.folder("a", [answered(i, i >= 4) for i in range(40)])
        (paired,) = self.rows(first, self.folder("b", [answered(i, True) for i in range(40)]))
        (row,) = self.rows(first, self.summary("s.json", 40, 40, 0.25))
        self.assertAlmostEqual(row.difference.value, paired.difference.value)
        self.assertIsNone(row.same_answers)
        self.assertLess(row.difference.low, paired.difference.low)

    def test_another_model_or_seed_is_refused(self):
        first = compare.load(self.folder("a", [answered(0, True)]))
        others = {"model_fingerprint": "other", "seed": 2, "depths": 5, "asked_within": [0, 1], "text_digest": "f"}
        for name, value in others.items():
            second = compare.load(self.folder(name, [answered(0, True)], **{name: value}))
            with self.assertRaisesRegex(ValueError, name):
                compare.check_same_questions(first, second)

    def test_the_same_text_may_lie_elsewhere(self):
        first = self.folder("a", [answered(0, True)], text=["/here"], text_digest="f")
        second = self.folder("b", [answered(0, True)], text=["/there"], text_digest="f")
        compare.check_same_questions(compare.load(first), compare.load(second))

    def test_other_questions_are_refused(self):
        with self.assertRaisesRegex(ValueError, "prompt 0 is not the same"):
            self.rows(self.folder("a", [answered(0, True)]), self.folder("b", [answered(0, True, answer="7")]))

    def test_exit_status_tells_the_outcome(self):
        same = self.folder("a", [answered(i, True) for i in range(40)])
        worse = self.folder("b", [answered(i, i >= 8) for i in range(40)])
        other = self.folder("c", [answered(i, True, setting="dense") for i in range(40)])
        for second, status, words in ((same, 0, "0 of 1 cells differ"), (worse, 1, "differs"), (other, 2, "no cell")):
            program = [sys.executable, "-B", compare.__file__, str(same), str(second)]
            run = subprocess.run(program, capture_output=True, text=True, check=False)
            self.assertEqual(run.returncode, status, run.stderr)
            self.assertIn(words, run.stdout + run.stderr)


if __name__ == "__main__":
    unittest.main()
