"""Tests that the Python client is typed: mypy --strict takes a program that uses it, and finds mistakes in another.

Exits with 77 (skipped, for CTest) without mypy.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USER = Path(__file__).with_name("typed_user.py")
EXAMPLE = ROOT / "client" / "python" / "examples" / "prefill_many.py"

if not importlib.util.find_spec("mypy"):
    print("skipped: mypy is not here")
    sys.exit(77)

MISTAKES = (
    ("Layout(block_tokens=64)", "Layout(block_tokens='64')", "arg-type"),
    ("lanes=2", "lane=2", "call-arg"),
    ("name: str = stream.request_id", "name: int = stream.request_id", "assignment"),
    ("return [token.id for token in answer]", "return [token.text for token in answer]", "attr-defined"),
    ("await stream.wait_accepted()", "stream.wait_accepted()", "unused-coroutine"),
)


class Typed(unittest.TestCase):
    def check(self, program: Path) -> str:
        # The client's own modules are read for their types, as those of an installed package are, and not judged.
        flags = ("--strict", "--follow-imports=silent", "--cache-dir", self.folder / "cache", "--no-error-summary")
        run = [sys.executable, "-B", "-m", "mypy", *flags, "--enable-error-code=unused-coroutine", program]
        done = subprocess.run(
            run, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT / "client" / "python")}
        )
        self.assertEqual(done.stderr, "")
        return done.stdout

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="prefilld-typed-")))

    def test_a_program_passes_and_one_with_mistakes_does_not(self):
        for program in (USER, EXAMPLE):
            self.assertEqual(self.check(program), "")
        wrong = USER.read_text()
        for right, mistake, _ in MISTAKES:
            self.assertEqual(wrong.count(right), 1, right)
            wrong = wrong.replace(right, mistake)
        program = self.folder / "wrong.py"
        program.write_text(wrong)
        found = [line for line in self.check(program).splitlines() if ": error: " in line]
        self.assertEqual(len(found), len(MISTAKES), found)
        for _, _, code in MISTAKES:
            self.assertTrue(any(line.endswith(f"[{code}]") for line in found), (code, found))


if __name__ == "__main__":
    unittest.main()
