"""Runs prefilld-gateway for the length of a test, and asks it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[2] / "client" / "python"
START_SECONDS = 60


class GatewayProcess:
    """The gateway as a process of its own. url: where it listens."""

    def __init__(self, model: Path, *flags: str):
        self._flags = (f"--model={model}", "--listen=127.0.0.1:0", *flags)

    def __enter__(self) -> GatewayProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="prefilld-gateway-")
        ports, self._log = Path(self._folder.name) / "ports", Path(self._folder.name) / "log"
        command = [sys.executable, "-B", "-m", "prefilld.gateway", *self._flags, f"--port_file={ports}"]
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(CLIENT)}
            )
        deadline = time.monotonic() + START_SECONDS
        while not ports.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = self.log()
                self.__exit__()
                raise RuntimeError(f"the gateway did not start:\n{log}")
            time.sleep(0.02)
        self.port = int(ports.read_text().split("=")[1])
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._folder.cleanup()

    def log(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.get("/health")[0] == 200, "the gateway's servers are up")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path: str, body: dict) -> Reply:
        return asyncio.run(ask(self.port, path, body))

    def metric(self, name: str, **labels: str) -> float:
        """Returns the sum over the series of one name that have the labels."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
                total += float(found[2])
        return total

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@dataclass
class Reply:
    """An answer over HTTP. events: what a stream brought, [DONE] left out; is_whole: whether the answer had its end."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict]:
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def error(self) -> dict | None:
        """Returns the error of the answer, or of the stream."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return next((e["error"] for e in self.events if "error" in e), None)
        return self.json.get("error")

    @property
    def text(self) -> str:
        return "".join(text_of(answer) for answer in (self.events or [self.json]))


def text_of(answer: dict) -> str:
    """Returns the text of an answer or of an event, of whatever kind."""
    for choice in answer.get("choices", []):
        part = choice.get("delta", choice.get("message", choice))
        return part.get("content", part.get("text")) or ""
    return ""


async def ask(port: int, path: str, body: dict, leave_after: int | None = None) -> Reply:
    """Asks over a connection of its own. leave_after: bytes of the answer after which the client hangs up."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + content)
        if leave_after is not None:
            await reader.read(leave_after)
            return Reply()
        return await read_reply(reader)
    finally:
        writer.close()


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    reply = Reply(int(status.split()[1]), dict(re.split(r":\s*", line.lower(), maxsplit=1) for line in lines if line))
    if "content-length" in reply.headers:
        reply.body = await reader.readexactly(int(reply.headers["content-length"]))
        reply.is_whole = True
        return reply
    parts = []
    while (line := await reader.readline()).strip():
        size = int(line, 16)
        parts.append((await reader.readexactly(size + 2))[:size])
        if size == 0:
            reply.is_whole = True
            break
    reply.body = b"".join(parts)
    return reply


def wait_until(is_so, what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
