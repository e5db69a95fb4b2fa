"""Tests measure.py against a prefilld of this build that serves model/tiny, whose tokens are bytes.

    python3 tests/evaluation/real_weights/measure_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the packages of the Python client or the weights of model/tiny.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import live_processes  # noqa: E402

if reason := live_processes.reason_to_skip():
    print(f"skipped: {reason}")
    sys.exit(77)

import measure  # noqa: E402
import settings  # noqa: E402
import sources  # noqa: E402
import texts  # noqa: E402

PREFILLD = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "prefilld"
SENTENCE = b"The old fisher carried a lantern to the harbour, and the harbour was quiet. "


class Arguments(unittest.TestCase):
    def test_settings_are_lines_and_dense_is_always_first(self):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("# all\nshare:gamma=0.8/0.9  # two\n\nvertical_slash\n")
            file.flush()
            names = [s.name for s in measure.read_settings(Path(file.name))]
        self.assertEqual(names, ["dense", "share:gamma=0.8", "share:gamma=0.9", "vertical_slash"])

    def test_the_settings_of_this_folder_are_known_to_the_contract(self):
        self.assertGreater(len(measure.read_settings(measure.HERE / "settings.txt")), 5)

    def test_a_length_says_how_many_texts(self):
        self.assertEqual(texts.parse_length("8192:48"), (8192, 48))
        for wrong in ("8192", "8192:0", "1:4", "40000:1", "x:2"):
            with self.assertRaisesRegex(ValueError, "length '"):
                texts.parse_length(wrong)


class Measuring(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        for role in sources.ROLES:
            about = {"kind": "prose", "package": "none", "files": []}
            texts.save(cls.folder, role, [([256, *SENTENCE * 10, *bytes(range(65, 91))], about) for _ in range(3)])

    def measure(self, out: str, settings_text: str, **changes) -> dict:
        arguments = argparse.Namespace(
            prefilld=PREFILLD, model=live_processes.MODEL, stretched=None, texts=self.folder, role="judging",
            out=self.folder / out, lengths=[(512, 2), (700, 3)], settings=settings.parse_all(settings_text.split()),
            device="cpu", clusters=None, concurrency=2, timeout=60, seconds=float("inf"),
        )  # fmt: skip
        vars(arguments).update(changes)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with live_processes.Programs() as programs:
                measure.measure(arguments, programs)
        return json.loads((arguments.out / "summary.json").read_text())

    def test_every_setting_has_a_cell_for_every_length(self):
        summary = self.measure("all", "dense baseline_random:density=0.3")
        cells = {(c["setting"], c["length"]): c for c in summary["text"]}
        self.assertEqual({key: c["texts"] for key, c in cells.items()}, {
            ("dense", 512): 2, ("dense", 700): 3,
            ("baseline_random:density=0.3", 512): 2, ("baseline_random:density=0.3", 700): 3,
        })  # fmt: skip
        random = cells["baseline_random:density=0.3", 700]
        self.assertGreater(random["perplexity_to_dense"]["value"], 1.0)
        self.assertLess(random["density"], 1.0)
        # All but the first sentence is a repeat, but for its end and the alphabet.
        self.assertGreater(random["lost_by_repeated"]["tokens"], 1800)
        self.assertIn("baseline_random:density=0.3", (self.folder / "all" / "table.txt").read_text())

    def test_a_run_without_time_keeps_what_it_has_and_goes_on_later(self):
        with self.assertRaises(FileNotFoundError):
            self.measure("later", "dense", seconds=float("inf"), texts=self.folder / "missing")
        begun = self.measure("later", "dense share", seconds=0.0)
        self.assertEqual(begun["text"], [])
        done = self.measure("later", "dense share")
        lines = (self.folder / "later" / "results.jsonl").read_text().splitlines()
        self.assertEqual((len(done["text"]), len(lines)), (4, 10))
        self.measure("later", "dense share")
        self.assertEqual((self.folder / "later" / "results.jsonl").read_text().splitlines(), lines)

    def test_a_setting_that_the_server_refuses_is_named_and_the_others_go_on(self):
        summary = self.measure("refused", "dense share:tau=7.0 vertical_slash", lengths=[(512, 1)])
        self.assertIn("tau", summary["refused"]["share:tau=7.0"])
        self.assertEqual([c["setting"] for c in summary["text"]], ["dense", "vertical_slash"])

    def test_texts_too_long_for_the_model_need_the_stretched_one(self):
        config = json.loads((live_processes.MODEL / "config.json").read_text())
        arguments = argparse.Namespace(model=live_processes.MODEL, stretched=None)
        with self.assertRaisesRegex(ValueError, "--stretched"):
            measure.Servers(arguments, None).client(config["max_position_embeddings"] + 1)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
