#!/usr/bin/env python3
"""Tests that no prompt of a benchmark fails unnoticed.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import sys
import unittest
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import grpc
    from short_beside_long import Sender

    from prefilld import PrefilldError
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class Senders(unittest.TestCase):
    def send(self, *outcomes):
        """Sends a prompt of two tokens for each outcome. Returns the sender, and how long it is to wait after each."""
        sender = Sender()
        with unittest.mock.patch("short_beside_long.prefill", side_effect=outcomes):
            return sender, [sender.send(None, [1, 2], "dense") for _ in outcomes]

    def test_refusals_are_counted_and_waited_for(self):
        full = PrefilldError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", 2.5)
        away = PrefilldError(grpc.StatusCode.UNAVAILABLE, "restarting")
        sender, waits = self.send(None, full, away)
        self.assertEqual((waits, sender.refused()), ([0.0, 2.5, 0.1], {2: 2}))

    def test_any_other_failure_is_no_end_of_a_thread_but_of_the_run(self):
        for failure in (PrefilldError(grpc.StatusCode.INVALID_ARGUMENT, "too long"), ValueError("too long")):
            sender, waits = self.send(failure, None)
            self.assertEqual(waits, [0.1, 0.0])
            with self.assertRaisesRegex(SystemExit, "a prompt failed: .*too long"):
                sender.refused()


if __name__ == "__main__":
    unittest.main()
