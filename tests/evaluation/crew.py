"""Processes that ask, one prompt at a time each, so that no interpreter lock is between the server and its load."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

import prompts
import settings
from asking import Asker, Asking
from prefilld import PrefilldError

PromptKey = tuple[str, int, int]  # task, length, index
Job = tuple[PromptKey, list[settings.Setting]]  # all that one prompt is still to be asked under
_FOR_THE_MAIN_PROCESS = (signal.SIGINT, signal.SIGTERM)  # they reach the whole group, and it decides


class Refused(Exception):
    """The server's refusal, or the error in a process."""


class Crew:
    """`with Crew(...) as crew: for record in crew.records(jobs): ...`; leaving ends the processes.

    Each makes its own prompts, which are a pure function of their key: only keys and records
    travel. A job is one process's, which makes its prompt once.
    """

    def __init__(self, size: int, source: prompts.Prompts, codec, asking: Asking):
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        self._processes, self._connections = [], []
        resource_tracker.ensure_running()  # its start would let the signals through again
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, source, codec, asking), daemon=True)
            # The process begins with these signals blocked, and can tell in peace that it ignores them.
            blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_MAIN_PROCESS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
            there.close()  # so that its end is seen here
            self._processes.append(process)
            self._connections.append(here)
        self._stopping = False

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def stop(self) -> None:
        """Starts no other prompt. records() ends once those under way are finished."""
        self._stopping = True

    def records(self, jobs: Iterable[Job]) -> Iterator[dict]:
        """Yields records as prompts are finished. When one fails, raises Refused and starts nothing else."""
        jobs = iter(jobs)
        left: dict[Connection, Job] = {}

        def start_next(connection: Connection) -> bool:
            if self._stopping:
                return False
            if not left.get(connection, (None, []))[1]:
                if (job := next(jobs, None)) is None:
                    return False
                left[connection] = job[0], list(job[1])
            key, under = left[connection]
            connection.send((key, under.pop(0)))
            return True

        busy = {connection for connection in self._connections if start_next(connection)}
        while busy:
            for connection in wait(busy):
                try:
                    answer = connection.recv()
                except EOFError:
                    raise Refused("a process of this evaluation was killed") from None
                if isinstance(answer, str):
                    raise Refused(answer)
                if not start_next(connection):
                    busy.remove(connection)
                yield answer


def _work(connection: Connection, source: prompts.Prompts, codec, asking: Asking) -> None:
    for number in _FOR_THE_MAIN_PROCESS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_MAIN_PROCESS)
    made = None
    with Asker(asking, codec) as asker:
        while True:
            try:
                key, setting = connection.recv()
            except EOFError:  # the main process is gone
                return
            try:
                if made is None or (made.task, made.length, made.index) != key:
                    made = source.make(*key)
                answer = asker.ask(made, setting)
            except (PrefilldError, ValueError) as error:
                answer = str(error)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)
