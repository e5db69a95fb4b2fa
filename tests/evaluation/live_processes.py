"""Runs programs of a build for the length of a test or of an evaluation."""

from __future__ import annotations

import subprocess
import tempfile
import time
import urllib.request
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


class Programs:
    """Programs of ours, each on ports of its own. They end with the `with` block."""

    def __init__(self):
        self._started: list[subprocess.Popen] = []
        self._at: dict[str, subprocess.Popen] = {}
        self._metrics: dict[str, str] = {}  # host:port of the page, by that of the program
        self._logs: dict[str, Path] = {}

    def __enter__(self) -> Programs:
        self._folder = tempfile.TemporaryDirectory(prefix="prefilld-live-")
        return self

    def __exit__(self, *_) -> None:
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            process.wait(timeout=START_SECONDS)
        self._folder.cleanup()

    def start(self, program: Path, model: Path, *flags: str) -> str:
        """Returns host:port once the program is ready. Raises RuntimeError with its log when it does not come up."""
        name = f"{program.name}.{len(self._started)}"
        port_file, log = (Path(self._folder.name) / f"{name}.{end}" for end in ("ports", "log"))
        command = [program, f"--model={model}", "--listen=127.0.0.1:0", f"--port_file={port_file}", *flags]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        self._started.append(process)
        deadline = time.monotonic() + START_SECONDS
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program.name} did not start:\n{log.read_text()}")
            time.sleep(0.05)
        ports = dict(line.split("=") for line in port_file.read_text().split())
        address = f"127.0.0.1:{ports['grpc']}"
        self._at[address] = process
        self._metrics[address] = f"127.0.0.1:{ports.get('metrics')}"
        self._logs[address] = log
        return address

    def process_at(self, address: str) -> subprocess.Popen:
        """Returns the process that start() started there last."""
        return self._at[address]

    def log(self, address: str) -> str:
        return self._logs[address].read_text()

    def metrics_address(self, address: str) -> str:
        """Returns host:port of the page of a program that has --metrics_listen=127.0.0.1:0."""
        return self._metrics[address]

    def metric(self, address: str, series: str) -> float:
        """Returns the value of a series, named with its labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address(address)}/metrics", timeout=START_SECONDS) as page:
            lines = page.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{series} ")).split()[-1])


class LiveProcesses(Programs):
    """The two processes over model/tiny. server and worker are host:port."""

    def __init__(self, bin_dir: Path):
        super().__init__()
        self._bin_dir = bin_dir

    def __enter__(self) -> LiveProcesses:
        super().__enter__()
        try:
            allowed = ",".join(contract.policies())
            flags = ("--metrics_listen=", f"--allowed_policies={allowed}")
            self.server = self.start(self._bin_dir / "prefilld", MODEL, *flags)
            self.worker = self.start(
                self._bin_dir / "prefilld-decode-worker", MODEL, f"--prefill_address={self.server}"
            )
        except BaseException:
            self.__exit__()
            raise
        return self
