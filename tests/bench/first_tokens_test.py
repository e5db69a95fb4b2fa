"""Tests that requests without a first token stand behind all others."""

import unittest

from first_tokens import NEVER, first_token_times, mean_of_report, percentile_of_report, percentiles, refused_of_report

LOG = """\
I 2026-01-01 request id=a outcome=ok tokens=512 policy=dense queue_ms=1 ttft_ms=30.04 tail_ms=1 total_ms=40 tenant=a
I 2026-01-01 request id=b outcome=ok tokens=512 policy=dense queue_ms=1 ttft_ms=10 tail_ms=1 total_ms=20
W 2026-01-01 request id=c outcome=stalled tokens=512 policy=dense queue_ms=1 ttft_ms=5 tail_ms=1 total_ms=20
W 2026-01-01 request id=d outcome=queue_full peer=x status="full"
I 2026-01-01 request id=e outcome=ok tokens=2048 policy=dense queue_ms=1 ttft_ms=70 tail_ms=1 total_ms=80
"""


class FirstTokens(unittest.TestCase):
    def test_percentiles_are_nearest_ranks(self):
        times = [float(i) for i in range(100, 0, -1)]
        self.assertEqual(percentiles(times), {"count": 100, "refused": 0, "p50": 50.0, "p90": 90.0, "p99": 99.0})
        self.assertEqual(percentiles([7.0])["p99"], 7.0)
        self.assertEqual(percentiles([]), {"count": 0, "refused": 0})

    def test_refused_requests_are_worse_than_all_others(self):
        times = [float(i) for i in range(1, 91)]
        made = percentiles(times, refused=10)
        self.assertEqual(made, {"count": 90, "refused": 10, "p50": 50.0, "p90": 90.0, "p99": "refused"})
        self.assertEqual(percentiles([], refused=2)["p50"], "refused")
        self.assertEqual(percentiles([1.0], refused=2)["p50"], "refused")

    def test_a_log_has_the_times_and_the_senders_the_refusals(self):
        made = first_token_times(LOG, {512: 3, 64: 1})
        self.assertEqual(list(made), ["64", "512", "2048"])
        self.assertEqual(made["512"], {"count": 2, "refused": 3, "p50": "refused", "p90": "refused", "p99": "refused"})
        self.assertEqual((made["64"]["count"], made["64"]["p50"]), (0, "refused"))
        self.assertEqual(made["2048"]["p50"], 70.0)
        self.assertEqual(first_token_times(LOG, {})["512"]["p99"], 30.0)

    def test_a_report_is_read_so_too(self):
        answered = {"count": 200, "mean": 5, "p50": 10, "p90": 20, "p95": 25, "p99": 30, "max": 40}
        whole = {"requests": 200, "first_token_ms": answered}
        self.assertEqual((percentile_of_report(whole, 0.99), mean_of_report(whole), refused_of_report(whole)), (30, 5, 0))
        some = {"requests": 201, "first_token_ms": answered}  # rank 199 of 200, which is above the p99 of the answered
        self.assertEqual((percentile_of_report(some, 0.99), mean_of_report(some), refused_of_report(some)), (40, NEVER, 1))
        self.assertEqual(percentile_of_report(some, 0.5), 20)  # no more is known of rank 101
        self.assertEqual(percentile_of_report({"requests": 203, "first_token_ms": answered}, 0.99), NEVER)
        self.assertEqual(percentile_of_report({"requests": 9, "first_token_ms": {"count": 0}}, 0.5), NEVER)


if __name__ == "__main__":
    unittest.main()
