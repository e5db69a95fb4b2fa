"""Tests the pictures of a summary. Needs matplotlib; exits with 77 (skipped, for CTest) without it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import scoring

if importlib.util.find_spec("matplotlib") is None:
    sys.exit(77)

import curves  # noqa: E402
import figures  # noqa: E402

DENSITY = {"dense": 1.0, "share:gamma=0.3": 0.1, "share:gamma=0.5": 0.2, "share:gamma=0.7": 0.3,
           "vertical_slash:gamma=0.3": 0.05, "vertical_slash:gamma=0.6": 0.22, "baseline_random:density=0.3": 0.3}  # fmt: skip
NAMES = {"score_against_density", "scores_end", "scores_within", "needle_depths_end", "needle_depths_within",
         "perplexity", "perplexity_against_density"}  # fmt: skip
FEW_RIGHT = {"share:gamma=0.3", "baseline_random:density=0.3"}


def summary() -> dict:
    records = []
    for setting, density in DENSITY.items():
        common = {"setting": setting, "density": density, "policy": setting.partition(":")[0], "heads": 64,
                  "pivot_heads": 4, "shared_heads": 12, "vertical_slash_heads": 48, "ttft_us": 1, "compute_us": 1,
                  "attention_us": 1, "pattern_us": 1}  # fmt: skip
        for length in (8192, 16384):
            for index in range(6):
                right = setting not in FEW_RIGHT or index < 3
                depth = index % 3 / 2
                common.update(length=length, index=index)
                records.append({**common, "task": "pass_key", "depth": depth, "right": right})
                records.append({**common, "task": "pass_key_within", "depth": depth, "right": right, "asked": 1})
                records.append({**common, "task": "interleaved", "depth": None, "right": 3 + right, "asked": 4})
                nats = {"nats": [1 + density * index / 10] * 8, "part_tokens": [1] * 8, "bytes": 8}
                records.append({**common, "task": "text", "depth": None, **nats})
    return scoring.summarize(records, list(DENSITY))


class Pictures(unittest.TestCase):
    def test_the_sparsest_share_that_keeps_the_answers_stands_beside_others_of_its_density(self):
        names = ["dense", "share:gamma=0.5", "vertical_slash:gamma=0.6", "baseline_random:density=0.3"]
        self.assertEqual(curves.compared_settings(summary()), names)

    def test_one_command_draws_every_picture_of_a_summary(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "summary.json"
            file.write_text(json.dumps(summary()))
            program = [sys.executable, "-B", figures.__file__, "--summary", str(file), "--out", folder]
            subprocess.run(program, check=True, capture_output=True)
            texts = {p.stem: p.read_text() for p in Path(folder).glob("*.svg")}
        self.assertEqual(set(texts), NAMES)
        for words in ("asked at the end", "asked within", "vertical-slash", "8k tokens"):
            self.assertIn(words, texts["score_against_density"])
        self.assertIn("interleaved", texts["scores_within"])
        self.assertNotIn("interleaved", texts["scores_end"])
        self.assertNotIn("interleaved", texts["needle_depths_within"])  # it has no needle
        self.assertIn("γ 0.5", texts["needle_depths_end"])

    def test_text_measured_without_parts_is_drawn_against_density_alone(self):
        whole = summary() | {"tasks": [], "overall": []}
        for cell in whole["text"]:
            del cell["by_part"]
        self.assertEqual([name for name, _ in curves.draw(whole)], ["perplexity_against_density"])

    def test_texts_of_a_second_summary_are_drawn_beside_those_of_the_first(self):
        first = summary() | {"tasks": [], "overall": []}
        rule = "flash_prefill:alpha=0.1,window_blocks=1,mean_of_rest=true"
        for cell in first["text"]:
            cell.pop("by_part")
        mine = [{**cell, "density": 0.9} for cell in first["text"] if cell["setting"] == "share:gamma=0.3"]
        other = {"text": [*mine, *({**cell, "setting": rule} for cell in mine)]}
        both = figures.together([first, other])
        self.assertEqual(len(both["text"]), len(first["text"]) + len(mine))
        self.assertNotIn(0.9, [c["density"] for c in both["text"] if c["setting"] != rule])
        ((_, figure),) = curves.draw(both)
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        self.assertIn("FlashPrefill, means of the rest, window blocks 1", legend)

    def test_a_summary_without_depths_has_no_needle_picture(self):
        short = summary()
        for cell in short["tasks"]:
            del cell["by_depth"]
        drawn = {name for name, _ in curves.draw(short)}
        self.assertEqual(drawn, {n for n in NAMES if not n.startswith("needle")})


if __name__ == "__main__":
    unittest.main()
