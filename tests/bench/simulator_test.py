"""Tests that prefill-simulator says what a real prefilld does, as nearly as a busy machine lets it.

    python3 tests/bench/simulator_test.py build/release/bin

Exits with 77 (skipped, for CTest) without the Python client's packages. The trace takes some ten seconds for each
of the two rules of --scheduling.
"""

import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation"), str(ROOT / "tests" / "bench")]
import live_processes  # noqa: E402

if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

import compare_simulator  # noqa: E402

# compare_simulator.py prints how near the times are on a quiet machine.
FACTOR = 2.5
# Whatever else uses the machine during one of the measurements moves the times apart. A simulator
# that is wrong is wrong every time.
ATTEMPTS = 3


class SimulatorTest(unittest.TestCase):
    def test_the_simulator_is_near_a_real_server_under_both_rules(self):
        args = compare_simulator.parse(
            [str(BIN_DIR), str(live_processes.MODEL), f"--trace={ROOT / 'tests' / 'bench' / 'small_trace.csv'}",
             "--num_requests=24", "--speedup=0.5", "--longest=2816", "--repeats=1", "--policy=dense",
             "--server_flags=--max_prompt_tokens=4096"]  # fmt: skip
        )
        for scheduling in ("turns", "fifo"):
            for attempt in range(1, ATTEMPTS + 1):
                report = compare_simulator.compare(args, scheduling)
                print(scheduling, report)
                self.assertEqual(report["ends"]["measured"], {"OK": 24})
                self.assertEqual(report["ends"]["simulated"], {"OK": 24})
                shares = [report["simulated_of_measured"][name] for name in ("mean", "p90")]
                if all(1 / FACTOR < share < FACTOR for share in shares):
                    break
                self.assertLess(attempt, ATTEMPTS, (scheduling, report))


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
