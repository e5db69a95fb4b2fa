"""Tests on the embedded model that policy `share` needs each of its parts: scores, last rows, sharing.

    python3 tests/evaluation/sparse_rules_test.py build/release/bin

Questions are asked within the prompts, where a rule that sees the last queries alone fails. Each test is
of a few fixed prompts, which the whole rule answers all right, and which it does not answer all right
without the part. Exits with 77 (skipped, for CTest) without the client's packages or the weights of
model/tiny.
"""

import sys
import unittest
from pathlib import Path

import live_processes

sys.path.insert(0, str(live_processes.ROOT / "client" / "python"))
SKIPPED = live_processes.reason_to_skip()
if SKIPPED:
    print(f"skipped: {SKIPPED}")
    sys.exit(77)

import asking  # noqa: E402
import prompts  # noqa: E402
from prefilld import Attention, Layout, PrefillClient  # noqa: E402

LENGTH = 4096
# coverage 0: no head shares, and every head is scored.
SCORED = {"policy": "share", "coverage": 0.0, "score_threshold": 0.9, "last_rows_gamma": 0.3, "min_budget_tokens": 16}


class Rules(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.processes = live_processes.LiveProcesses(Path(sys.argv[1]))
        live = cls.processes.__enter__()
        cls.client = PrefillClient(live.server)
        made = prompts.Prompts(prompts.ByteCodec(), None, depths=5, seed=1, limit=2 * LENGTH)
        cls.prompts = [made.make(task, LENGTH, i) for task in ("interleaved", "key_value_within") for i in (0, 1)]

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.processes.__exit__()

    def ask(self, **attention):
        """Returns the share of questions that are answered right, and the stats of the last prompt's layers together."""
        right = asked = 0
        for prompt in self.prompts:
            no_cache = Layout(16, first_block=-(-LENGTH // 16))
            with self.client.prefill(
                prompt.tokens, layout=no_cache, attention=Attention(**attention), prompt_logprobs=True, timeout=100
            ) as stream:
                for _ in stream:
                    pass
                result = stream.result
            graded = asking.grade_within(prompt, result)
            right, asked = right + graded["right"], asked + graded["asked"]
        return right / asked, result.total

    def test_scored_heads_answer_what_is_asked_within(self):
        score, total = self.ask(**SCORED)
        self.assertEqual(score, 1.0)
        self.assertEqual(total.scored_heads, 64)
        self.assertLess(total.density, 0.45)

    def test_they_do_not_without_scores(self):
        score, _ = self.ask(**{**SCORED, "score_threshold": 0.001})
        self.assertLess(score, 1.0)

    def test_they_do_not_without_the_last_rows(self):
        score, _ = self.ask(**{**SCORED, "last_rows_gamma": 0.0001, "min_budget_tokens": 0})
        self.assertLess(score, 1.0)

    def test_heads_of_the_models_own_groups_share(self):
        score, total = self.ask(policy="share")
        self.assertEqual(score, 1.0)
        self.assertGreater(total.pivot_heads, 0)
        self.assertGreater(total.shared_heads, 0)
        self.assertEqual(total.vertical_slash_heads, 0)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
