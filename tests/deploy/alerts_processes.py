"""Runs a Prometheus, and the programs that it scrapes, for the length of a test."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "model" / "tiny"
sys.path.insert(0, str(ROOT / "client" / "python"))
START_SECONDS = 120


def reason_to_skip() -> str | None:
    """Returns why these tests cannot run here, or None when they can."""
    try:
        import google.protobuf  # noqa: F401
        import grpc  # noqa: F401
        import numpy  # noqa: F401
        import xxhash  # noqa: F401
    except ImportError as error:
        return f"the Python client needs {error.name}"
    if not shutil.which("prometheus") or not shutil.which("promtool"):
        return "there is no prometheus (deploy/install_packages.sh --tests)"
    return None if list(MODEL.glob("*.safetensors")) else f"{MODEL} holds no weights"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.1)


class Server:
    """A prefilld or a decode worker, on ports that it keeps over restarts, so that Prometheus knows it before it starts.

    instance: its name for Prometheus.
    """

    def __init__(self, program: Path, instance: str, folder: Path, *flags: str, environment: dict | None = None):
        self.instance, self.job, self.log = instance, program.name, folder / f"{instance}.log"
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._port_file = folder / f"{instance}.ports"
        self._command = [program, f"--model={MODEL}", "--device=cpu", "--cpu_threads=1", f"--listen={self.address}",
                         f"--metrics_listen=127.0.0.1:{self.metrics_port}", f"--port_file={self._port_file}", *flags]  # fmt: skip
        self._environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the process and returns; see wait_until_ready."""
        self._port_file.unlink(missing_ok=True)
        with self.log.open("a") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output, env=self._environment)

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.instance} did not start:\n{self.log.read_text()}")
            return self._port_file.exists()

        wait_until(ready, f"{self.instance} is ready", START_SECONDS)

    def page(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as page:
            return page.read().decode()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Ends the process, whatever state it is in."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


class Prometheus:
    """A Prometheus in a folder of its own that scrapes the servers every `scrape_seconds`."""

    def __init__(self, folder: Path, servers: list[Server], rules: dict | None = None, scrape_seconds: float = 0.5):
        self._folder = folder
        folder.mkdir()
        interval = f"{round(1000 * scrape_seconds)}ms"
        jobs: dict[str, list] = {}
        for server in servers:
            target = {"targets": [f"127.0.0.1:{server.metrics_port}"], "labels": {"instance": server.instance}}
            jobs.setdefault(server.job, []).append(target)
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "scrape_configs": [{"job_name": job, "static_configs": targets} for job, targets in jobs.items()],
        }
        if rules is not None:
            (folder / "rules.yaml").write_text(yaml.safe_dump(rules, sort_keys=False))
            config["rule_files"] = [str(folder / "rules.yaml")]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config, sort_keys=False))
        self.port = free_port()

    def __enter__(self) -> Prometheus:
        command = ["prometheus", f"--config.file={self._folder}/prometheus.yml", "--log.level=warn",
                   f"--storage.tsdb.path={self._folder}/data", f"--web.listen-address=127.0.0.1:{self.port}"]  # fmt: skip
        with (self._folder / "log").open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, cwd=self._folder)
        try:
            wait_until(self._is_ready, "Prometheus is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError((self._folder / "log").read_text())
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5).status == 200
        return False

    def ask(self, path: str, **parameters) -> list | dict:
        """Returns the data of an answer of the HTTP API. Raises ValueError, with the API's words, for a bad query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from error

    def query(self, expr: str) -> list[dict]:
        return self.ask("query", query=expr)["result"]

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict]:
        return self.ask("query_range", query=expr, start=start, end=end, step=step)["result"]

    def firing(self) -> set[tuple[str, str]]:
        """Returns the alerts that fire now, with the instance of each; '' for one without."""
        alerts = self.ask("alerts")["alerts"]
        return {(a["labels"]["alertname"], a["labels"].get("instance", "")) for a in alerts if a["state"] == "firing"}


@contextlib.contextmanager
def running(servers: list[Server]):
    """Starts the servers together and waits until all are ready; stops them in the end."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.stop()


@contextlib.contextmanager
def temporary_folder():
    with tempfile.TemporaryDirectory(prefix="prefilld-alerts-") as folder:
        yield Path(folder)
