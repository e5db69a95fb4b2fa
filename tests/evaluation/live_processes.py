"""Runs prefilld and a decode worker of a build, over model/tiny, for the length of a test."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import contract

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "model" / "tiny"
START_SECONDS = 60


def reason_to_skip() -> str | None:
    """Returns why tests over real processes cannot run here, or None when they can."""
    try:
        import google.protobuf  # noqa: F401
        import grpc  # noqa: F401
        import numpy  # noqa: F401
        import xxhash  # noqa: F401
    except ImportError as error:
        return f"the Python client needs {error.name}"
    return None if list(MODEL.glob("*.safetensors")) else f"{MODEL} holds no weights"


class LiveProcesses:
    """The two processes. server and worker are host:port; both end with the `with` block."""

    def __init__(self, bin_dir: Path):
        self._bin_dir = bin_dir
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> LiveProcesses:
        self._folder = tempfile.TemporaryDirectory(prefix="prefilld-live-")
        try:
            allowed = ",".join(contract.policies())
            self.server = self._start("prefilld", "--metrics_listen=", f"--allowed_policies={allowed}")
            self.worker = self._start("prefilld-decode-worker", f"--prefill_address={self.server}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            process.wait(timeout=START_SECONDS)
        self._folder.cleanup()

    def _start(self, program: str, *flags: str) -> str:
        port_file, log = (Path(self._folder.name) / f"{program}.{end}" for end in ("ports", "log"))
        command = [
            self._bin_dir / program,
            f"--model={MODEL}",
            "--listen=127.0.0.1:0",
            f"--port_file={port_file}",
            *flags,
        ]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        self._started.append(process)
        deadline = time.monotonic() + START_SECONDS
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program} did not start:\n{log.read_text()}")
            time.sleep(0.05)
        ports = dict(line.split("=") for line in port_file.read_text().split())
        return f"127.0.0.1:{ports['grpc']}"
