#!/usr/bin/env python3
"""Tests that traces have the lengths of their sources and are what their first line says."""

import csv
import io
import unittest
from pathlib import Path

import make_trace

FOLDER = Path(__file__).parent


def trace_of(command_line: str) -> str:
    out = io.StringIO()
    make_trace.write_trace(make_trace.parse(command_line.split()), out)
    return out.getvalue()


def read(trace: str) -> list[dict]:
    return list(csv.DictReader(line for line in trace.splitlines() if not line.startswith("#")))


class MakeTraceTest(unittest.TestCase):
    def test_lengths_have_the_percentiles_of_the_source(self):
        for name, expected in make_trace.LENGTHS.items():
            lengths = sorted(int(row["tokens"]) for row in read(trace_of(f"--mix={name} --requests=20000")))
            for percentile, length in list(zip(make_trace.PERCENTILES, expected))[2:-2]:
                drawn = lengths[int(percentile / 100 * len(lengths))]
                self.assertAlmostEqual(drawn / length, 1, delta=0.1, msg=f"{name}, {percentile} %")
            self.assertGreaterEqual(lengths[0], expected[0])
            self.assertLessEqual(lengths[-1], expected[-1])

    def test_arrivals_come_at_the_rate_in_order(self):
        arrivals = [float(row["arrival_s"]) for row in read(trace_of("--requests=20000 --rate=50"))]
        self.assertEqual(arrivals, sorted(arrivals))
        self.assertAlmostEqual(arrivals[-1], 400, delta=15)

    def test_a_third_of_the_tokens_of_conversations_begin_an_earlier_prompt(self):
        latest: dict[str, int] = {}
        shared = tokens = 0
        for row in read(trace_of("--mix=mooncake_conversation --requests=12000")):
            length = int(row["tokens"])
            self.assertEqual(int(row["prefix_tokens"]), length)
            self.assertLess(latest.get(row["prefix"], 0), length)  # the next turn is longer
            shared += latest.get(row["prefix"], 0)
            tokens += length
            latest[row["prefix"]] = length
        self.assertAlmostEqual(shared / tokens, 0.37, delta=0.04)

    def test_azure_shares_nothing_and_tenants_are_even(self):
        rows = read(trace_of("--mix=azure_code --requests=9000 --tenants a b c"))
        self.assertEqual({row["prefix"] for row in rows}, {""})
        for tenant in "abc":
            self.assertAlmostEqual(sum(row["tenant"] == tenant for row in rows), 3000, delta=200)

    def test_scale_and_limit(self):
        lengths = [int(row["tokens"]) for row in read(trace_of("--requests=1000 --scale=0.1 --max_tokens=900"))]
        self.assertEqual(max(lengths), 900)
        self.assertEqual(min(lengths), 1)

    def test_the_kept_trace_is_what_its_first_line_says(self):
        kept = (FOLDER / "small_trace.csv").read_text()
        command_line = kept.splitlines()[0].split("make_trace.py ")[1]
        self.assertEqual(kept, trace_of(command_line))


if __name__ == "__main__":
    unittest.main()
