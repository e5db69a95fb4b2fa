"""One line that tells how far a long run is: rewritten on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    QUIET_SECONDS = 20  # between two lines where there is no terminal

    def __init__(self, total: int, done: int):
        self._total, self._done, self._begin_done = total, done, done
        self._begin = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        if done:
            print(f"{done} of {total} prompts were done before", file=sys.stderr)

    def step(self, record: dict) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else self.QUIET_SECONDS) and self._done < self._total:
            return
        self._shown = now
        speed = (self._done - self._begin_done) / max(now - self._begin, 1e-9)
        left = (self._total - self._done) / speed
        line = (
            f"{self._done}/{self._total} prompts, {speed:.1f}/s, {left / 60:.1f} min left; "
            f"{record['length']} {record['task']} {record['setting']}: "
            f"{1e-3 * record['compute_us']:.0f} ms, density {record['density']:.2f}"
        )
        print(f"\r\033[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        if self._terminal:
            print(file=sys.stderr)
