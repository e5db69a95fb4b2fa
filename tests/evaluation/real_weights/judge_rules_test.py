"""Tests that rules.py computes what prefilld serves, on model/tiny, and the rules that prefilld does not have by hand.

    python3 tests/evaluation/real_weights/judge_rules_test.py build/release/bin

Exits with 77 (skipped, for CTest) without PyTorch, safetensors, the packages of the Python client or the weights of
model/tiny.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import live_processes  # noqa: E402

MISSING = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
if reason := ", ".join(MISSING) or live_processes.reason_to_skip():
    print(f"skipped: {reason}")
    sys.exit(77)

import draw_heads  # noqa: E402
import judge_rules  # noqa: E402
import measure  # noqa: E402
import numpy as np  # noqa: E402
import rules  # noqa: E402
import settings  # noqa: E402
import texts  # noqa: E402
import torch  # noqa: E402

PREFILLD = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "prefilld"
TOKENS = 640
# A rule here and the setting of a server that names the same.
SERVED = {
    "antidiagonal:score_threshold=0.8,last_rows_gamma=0.3":
        "share:coverage=0,min_budget_tokens=0,score_threshold=0.8,last_rows_gamma=0.3",
    "antidiagonal:score_threshold=0.7,last_rows_gamma=0.0001,score_stride=16":
        "share:coverage=0,min_budget_tokens=0,score_threshold=0.7,last_rows_gamma=0.0001,score_stride=16",
    "vertical_slash:gamma=0.5": "vertical_slash:min_budget_tokens=0,gamma=0.5",
}  # fmt: skip


def drawn(heads: int, tokens: int, dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(torch.randn(heads, tokens, dim) for _ in range(3))


class BesideTheServer(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        source = (Path(__file__).parent / "measure.py").read_bytes()
        about = {"kind": "code", "package": "none", "files": []}
        rows = [([256, *source[i * TOKENS : (i + 1) * TOKENS - 1]], about) for i in range(2)]
        texts.save(cls.folder, "judging", rows)

    def arguments(self, out: str, **more) -> argparse.Namespace:
        return argparse.Namespace(
            model=live_processes.MODEL, stretched=None, texts=self.folder, role="judging", out=self.folder / out,
            lengths=[(TOKENS, 1)], seconds=float("inf"), device="cpu", **more,
        )  # fmt: skip

    def judged(self, out: str, *lines: str, **more) -> dict:
        file = self.folder / "rules.txt"
        file.write_text("\n".join(lines))
        arguments = self.arguments(out, rules=judge_rules.read_rules(file))
        vars(arguments).update(more)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            summary = judge_rules.judge(arguments)
        return {cell["setting"]: cell for cell in summary["text"]}

    def test_the_same_blocks_and_the_same_loss_as_a_server(self):
        arguments = self.arguments(
            "served", prefilld=PREFILLD, settings=settings.parse_all(["dense", *SERVED.values()]), clusters=None,
            concurrency=2, timeout=60,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), live_processes.Programs() as programs:
            measure.measure(arguments, programs)
        summary = measure.json.loads((arguments.out / "summary.json").read_text())
        served = {cell["setting"]: cell for cell in summary["text"]}
        here = self.judged("here", *SERVED)
        dense = [cells["dense"]["perplexity"]["value"] for cells in (here, served)]
        self.assertAlmostEqual(*dense, delta=0.002)
        for rule, setting in SERVED.items():
            ours, theirs = here[rule], served[settings.parse(setting)[0].name]
            self.assertLess(ours["density"], 0.9)
            self.assertGreater(ours["perplexity_to_dense"]["value"], 1.0005, "too little is lost to compare")
            # Scores that tie but for rounding may choose another block.
            self.assertAlmostEqual(ours["density"], theirs["density"], delta=0.001, msg=rule)
            lost = math.log(theirs["perplexity_to_dense"]["value"])
            self.assertAlmostEqual(
                math.log(ours["perplexity_to_dense"]["value"]), lost, delta=0.05 * lost + 0.0002, msg=rule
            )

    def test_a_run_without_time_goes_on_later(self):
        short = {"lengths": [(256, 2)]}
        self.assertEqual(self.judged("later", "vertical_slash", seconds=-1.0, **short), {})
        self.assertEqual(self.judged("later", "vertical_slash", **short)["vertical_slash"]["texts"], 2)

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not here")
    def test_heads_are_drawn_from_maps_that_are_kept(self):
        maps, picture = self.folder / "maps.npz", self.folder / "heads.svg"
        command = ["", "--maps", str(maps), "--heads", "1.2", "7.0", "--out", str(picture)]
        made = ["--model", str(live_processes.MODEL), "--texts", str(self.folder), "--length", "256"]
        for arguments in ([*command, *made], command):
            with unittest.mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(io.StringIO()):
                draw_heads.main()
            self.assertIn("layer 7, head 0", picture.read_text())
            picture.unlink()
        kept = np.load(maps)
        self.assertEqual(kept["mass"].shape, (64, 2, 2))
        np.testing.assert_allclose(kept["mass"].astype(np.float32).sum(-1), 1, atol=0.002)
        for title in draw_heads.RULES:
            np.testing.assert_array_equal(kept[title], np.broadcast_to(np.tril(np.ones((2, 2), bool)), (64, 2, 2)))


class FlashPrefill(unittest.TestCase):
    def test_rows_take_what_their_queries_together_see_in_the_mean_keys(self):
        block, alpha = 4, 0.3
        q, k, _ = drawn(3, 8 * block, 8, seed=1)
        rule = rules.FlashPrefill(block=block, alpha=alpha, sink_blocks=1, window_blocks=2, full_rows=1)
        pattern = rule.choose(8 * q, k)
        for head in range(3):
            for row in range(8):
                energy = [0.0] * 8
                for i in range(row * block, (row + 1) * block):
                    for c in range(8):
                        if (c + 1) * block - 1 <= i:
                            mean = k[head, c * block : (c + 1) * block].mean(0)
                            energy[c] += math.exp(float(8 * q[head, i] @ mean) / math.sqrt(8))
                for c in range(8):
                    wanted = c <= row and (energy[c] >= alpha * max(energy) or c == 0 or row - c < 2 or row == 7)
                    self.assertEqual(bool(pattern[head, row, c]), wanted, (head, row, c))
        self.assertLess(float(rules.reference.density(pattern).mean()), 0.9)


class BestBlocks(unittest.TestCase):
    def test_no_fewer_blocks_of_a_row_hold_as_much(self):
        block, gamma = 4, 0.7
        q, k, _ = drawn(3, 8 * block, 8, seed=4)
        pattern = rules.BestBlocks(block=block, gamma=gamma).choose(4 * q, k)
        later = torch.ones(8 * block, 8 * block, dtype=torch.bool).triu(1)
        attention = (4 * q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(later, -math.inf).softmax(-1)
        for head in range(3):
            for row in range(8):
                rows = attention[head, row * block : (row + 1) * block]
                mass = [float(rows[:, c * block : (c + 1) * block].sum()) / block for c in range(8)]
                ranked = sorted(range(8), key=mass.__getitem__, reverse=True)
                needed = next(n for n in range(1, 9) if sum(mass[c] for c in ranked[:n]) >= gamma)
                chosen = {c for c in range(8) if pattern[head, row, c]}
                self.assertEqual(chosen, {0, row, *ranked[:needed]}, (head, row))
        self.assertLess(float(rules.reference.density(pattern).mean()), 0.9)


class Attention(unittest.TestCase):
    def test_all_blocks_are_dense_attention(self):
        q, k, v = drawn(2, 96, 8, seed=2)
        rule = rules.Rule(block=32)
        out = rules.attend(rule, q, k, v, torch.ones(2, 3, 3, dtype=torch.bool).tril())
        later = torch.ones(96, 96, dtype=torch.bool).triu(1)
        logits = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(later, -math.inf)
        torch.testing.assert_close(out, logits.softmax(-1) @ v)

    def test_means_stand_for_blocks_whose_keys_are_all_alike(self):
        q, k, v = drawn(2, 96, 8, seed=3)
        k, v = (x[:, ::32].repeat_interleave(32, 1) for x in (k, v))
        diagonal = torch.eye(3, dtype=torch.bool).expand(2, 3, 3)
        everything = torch.ones(2, 3, 3, dtype=torch.bool).tril()
        wanted = rules.attend(rules.Rule(block=32), q, k, v, everything)
        torch.testing.assert_close(rules.attend(rules.Rule(block=32, mean_of_rest=True), q, k, v, diagonal), wanted)
        without = rules.attend(rules.Rule(block=32), q, k, v, diagonal)
        self.assertGreater(float((without - wanted).abs().max()), 0.1)


class Lines(unittest.TestCase):
    def test_a_line_may_name_several_rules(self):
        parsed = rules.parse("flash_prefill:alpha=0.1/0.2,window_blocks=1,mean_of_rest=true")
        names = [f"flash_prefill:alpha={alpha},window_blocks=1,mean_of_rest=true" for alpha in (0.1, 0.2)]
        self.assertEqual(list(parsed), names)
        self.assertEqual(list(parsed.values())[1], rules.FlashPrefill(alpha=0.2, window_blocks=1, mean_of_rest=True))

    def test_wrong_lines_are_refused(self):
        for wrong in ("flash:alpha=1", "flash_prefill:gamma=1", "flash_prefill:alpha=x", "best_blocks:mean_of_rest=1"):
            with self.assertRaises(ValueError, msg=wrong):
                rules.parse(wrong)

    def test_the_rules_of_this_folder_are_known(self):
        self.assertGreater(len(judge_rules.read_rules(judge_rules.HERE / "rules.txt")), 10)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
