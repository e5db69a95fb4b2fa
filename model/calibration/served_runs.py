"""Measures what a cluster file does to perplexity, by serving the model with it.

Needs the Python client's packages (grpcio, protobuf, numpy, xxhash) once something is served.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from make_prompts import with_tokenizer  # first: it makes model/tiny importable

import corpus
import tasks

sys.path.append(str(Path(__file__).resolve().parents[2] / "client" / "python"))

Texts = dict[int, list[list[int]]]  # token ids, by length


def read_texts(folders: list[str], lengths: list[int], count: int, tokenizer: Path | None, seed: int) -> Texts:
    """Cuts texts from anywhere in the folders, the same ones in every run. They are bytes without a tokenizer."""
    blobs = corpus.load(folders, held_out=None).blobs
    text, held = corpus.Corpus(blobs, [len(blob) for blob in blobs]), sum(map(len, blobs))

    def tokens(length: int, index: int) -> list[int]:
        def bytes_of_size(size: int) -> bytes:
            if size > held:
                raise ValueError(f"--text has {held} bytes; {size} are needed for {length} tokens")
            return text.filler(random.Random(f"{seed} {length} {index}"), size)

        if tokenizer:
            return with_tokenizer(tokenizer, bytes_of_size, length)
        return tasks.encode(bytes_of_size(length - 1))

    return {length: [tokens(length, index) for index in range(count)] for length in lengths}


@dataclass(frozen=True)
class Server:
    """The way to start a prefilld."""

    prefilld: Path
    model: Path
    device: str
    max_prompt_tokens: int

    @contextmanager
    def serving(self, clusters: Path) -> Iterator[str]:
        """Starts a prefilld with this cluster file and yields its address. The process ends with the `with` block."""
        with tempfile.TemporaryDirectory(prefix="prefilld-calibration-") as folder:
            ports, log = Path(folder) / "ports", Path(folder) / "log"
            command = [
                self.prefilld, f"--model={self.model}", f"--clusters={clusters}", f"--device={self.device}",
                f"--max_prompt_tokens={self.max_prompt_tokens}", "--listen=127.0.0.1:0", "--metrics_listen=",
                f"--port_file={ports}",
            ]  # fmt: skip
            with log.open("w") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output)
            try:
                while not ports.exists():  # without a limit: a large checkpoint takes minutes
                    if process.poll() is not None:
                        raise RuntimeError(f"prefilld did not start:\n{log.read_text()[-2000:]}")
                    time.sleep(0.05)
                yield "127.0.0.1:" + re.search(r"grpc=(\d+)", ports.read_text())[1]
            finally:
                process.terminate()
                process.wait()


def measure(name: str, policy: str, address: str, texts: Texts, thresholds: dict[str, float] | None = None) -> dict:
    """Returns nats per token of every text and mean density, by length, as a line of the journal. Thresholds that are
    not named are the server's.
    """
    from prefilld import Attention, Layout, PrefillClient, PrefilldError

    def result_of(client: PrefillClient, tokens: list[int]):
        no_cache = Layout(first_block=-(-len(tokens) // Layout.block_tokens))
        options = {"layout": no_cache, "attention": Attention(policy, **(thresholds or {})), "prompt_logprobs": True}
        with client.prefill(tokens, **options) as stream:
            stream.read_all()
        return stream.result

    record = {"run": name, "nats": {}, "density": {}}
    try:
        with PrefillClient(address) as client:
            for length, prompts in texts.items():
                results = [result_of(client, tokens) for tokens in prompts]
                record["nats"][str(length)] = [-fmean(result.prompt_logprobs) for result in results]
                record["density"][str(length)] = fmean(result.total.density for result in results)
    except PrefilldError as error:
        raise RuntimeError(f"prefilld refused {name}: {error}") from None
    return record


class Journal:
    """Finished runs, one JSON object a line, below a line that identifies what they measure."""

    def __init__(self, path: Path, subject: dict):
        """Raises ValueError when the file holds runs of something else."""
        lines = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut off by a kill; it runs again
        if lines and lines[0] != subject:
            other = ", ".join(name for name in subject if lines[0].get(name) != subject[name])
            raise ValueError(f"{path} holds runs that differ in {other}; take another --out, or delete it")
        self.runs: dict[str, dict] = {record["run"]: record for record in lines[1:]}
        self._path = path
        path.write_text("".join(json.dumps(line) + "\n" for line in [subject, *self.runs.values()]))

    def add(self, record: dict) -> None:
        self.runs[record["run"]] = record
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
