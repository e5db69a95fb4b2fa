"""Tests how the loads of two rules are compared."""

import unittest

from equal_p99 import alone_ms, full_speedup, load_for, measures, percentile, requests_of
from first_tokens import NEVER

PROFILE = {
    "num_layers": 5, "crossover_tokens": 1000, "request_us": 0,
    "prompts": [{"policy": policy, "num_tokens": tokens, "layer_us": us, "last_layer_us": us / 2, "first_token_us": us / 2}
                for policy, tokens, us in (("dense", 100, 200), ("dense", 400, 1600), ("dense", 1600, 12800),
                                           ("share", 1000, 2000), ("share", 2000, 4000))],
}  # fmt: skip


class EqualP99(unittest.TestCase):
    def test_time_alone_grows_by_a_power_between_the_lengths_and_beyond(self):
        alone = alone_ms(PROFILE, "auto")
        for tokens, ms in ((100, 1), (200, 2 * 2**0.5), (400, 8), (1000, 10), (1500, 15), (8000, 80)):
            self.assertAlmostEqual(alone(tokens), ms)
        self.assertAlmostEqual(alone_ms(PROFILE, "dense")(1600), 64)

    def test_load_1_is_as_much_as_there_is_time_for(self):
        trace = "# made\narrival_s,tokens,prefix,prefix_tokens,tenant\n0.5,100,,,\n2.0,400,c,400,\n"
        self.assertAlmostEqual(full_speedup(trace, lambda tokens: 10 * tokens), 2.0 / 5)

    def test_every_request_counts_once_for_the_stretch(self):
        requests = [(100, 1.0)] * 98 + [(2000, 300.0), (2000, 400.0)]
        found = measures(requests, lambda tokens: tokens / 100)
        self.assertEqual(found["p99_ms"], 300.0)
        self.assertEqual(found["p99_stretch"], 15.0)
        self.assertEqual(found["p99_ms up to 1024"], 1.0)
        self.assertEqual(found["p99_ms up to 4096"], 400.0)

    def test_requests_without_a_first_token_stand_behind_all_others(self):
        report = {"each": [{"tokens": 5, "first_token_ms": None}, {"tokens": 6, "first_token_ms": 2.5}]}
        self.assertEqual(requests_of(report), [(5, NEVER), (6, 2.5)])
        self.assertEqual(percentile([1.0] * 98 + [NEVER] * 2, 0.99), NEVER)
        self.assertEqual(percentile([1.0] * 99 + [NEVER], 0.99), 1.0)

    def test_the_load_for_a_p99_lies_between_those_that_were_tried(self):
        tried = {0.5: 100.0, 0.7: 200.0, 0.9: NEVER}
        self.assertEqual(load_for(150.0, tried), (0.6, ""))
        self.assertEqual(load_for(200.0, tried), (0.7, ""))
        self.assertEqual(load_for(250.0, tried), (0.7, ""))
        self.assertEqual(load_for(50.0, tried), (0.5, "below"))
        self.assertEqual(load_for(300.0, {0.5: 100.0, 0.7: 200.0}), (0.7, "above"))


if __name__ == "__main__":
    unittest.main()
