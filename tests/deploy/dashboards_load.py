"""A prefilld and a decode worker with everything switched on that the dashboard shows, and a load for them."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import threading
from pathlib import Path

from alerts_processes import MODEL, ROOT, Server

from prefilld import Attention, DecodeClient, Layout, PrefillClient, PrefilldError

VOCABULARY = 256
TENANTS = {
    "unknown": "default",
    "tenants": [
        {"name": "search", "weight": 3},
        {"name": "reports", "max_requests": 1},
        {"name": "default"},
    ],
}
# A promise such as model/calibration/calibrate.py writes. The figures are made up, to be found again on the page.
MEASURED = {"perplexity_rise": 0.004, "standard_error": 0.001, "worst_prompt": 0.009, "density": 0.4, "prompts": 8}
PROMISE = {"max_perplexity_rise": 0.01, "shortest_tokens": 2000, "longest_tokens": 8000, "measured": MEASURED}


def make_certificate(folder: Path, days: int, name: str = "cert") -> tuple[Path, Path]:
    """Makes a certificate for 127.0.0.1 that signs itself, so that it is its own authority, and returns it and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
               "-keyout", key, "-out", certificate, "-days", str(days), "-subj", "/CN=prefilld",
               "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def promising_clusters(folder: Path) -> Path:
    """Writes the embedded model's cluster file with a promise in it."""
    clusters = json.loads((MODEL / "head_clusters.json").read_text())
    clusters["calibration"] = PROMISE
    path = folder / "promising_clusters.json"
    path.write_text(json.dumps(clusters))
    return path


class Shown:
    """The two programs. A second address, without TLS, is for callers that need none."""

    def __init__(self, bin_dir: Path, folder: Path, clusters: Path):
        certificate, key = make_certificate(folder, days=90)
        (folder / "tenants.json").write_text(json.dumps(TENANTS))
        tls = (f"--tls_cert={certificate}", f"--tls_key={key}", f"--tls_client_ca={certificate}")
        self.prefill = Server(
            bin_dir / "prefilld", "prefill", folder, *tls, "--tenant_from=metadata", f"--tenants={folder}/tenants.json",
            f"--clusters={clusters}", "--prefix_cache_bytes=50000000", "--recall_audit_fraction=0.5",
            "--max_prompt_tokens=8192", "--crossover_tokens=1024", "--queue_capacity=16")  # fmt: skip
        to_prefill = (f"--prefill_tls_ca={certificate}", f"--prefill_tls_cert={certificate}", f"--prefill_tls_key={key}")
        self.decode = Server(
            bin_dir / "prefilld-decode-worker", "decode", folder, f"--prefill_address={self.prefill.address}",
            "--prefill_tls", *to_prefill, "--kv_pool_tokens=16384")  # fmt: skip
        self._certificate, self._key = certificate, key

    @property
    def servers(self) -> list[Server]:
        return [self.prefill, self.decode]

    def prefill_client(self) -> PrefillClient:
        import grpc

        credentials = grpc.ssl_channel_credentials(
            self._certificate.read_bytes(), self._key.read_bytes(), self._certificate.read_bytes())  # fmt: skip
        return PrefillClient(self.prefill.address, credentials=credentials)


class Load:
    """Callers that go on until the `with` block ends. Each sends prompts of the kinds that it is given, in turn.

    errors: what no caller may see.
    """

    # (tenant, policy, tokens, seconds until the next); prompts of one text begin alike.
    KINDS = (
        ("search", "share", 1200, 0.2),
        ("search", "dense", 300, 0.2),
        ("reports", "share", 4200, 1.0),
        ("default", "vertical_slash", 1200, 0.5),
    )

    def __init__(self, shown: Shown, kinds=KINDS, seed: int = 1):
        self._shown, self._kinds, self._random = shown, kinds, random.Random(seed)
        self._text = (ROOT / "deploy" / "README.md").read_bytes()
        self._stop = threading.Event()
        self.errors: list[str] = []

    def __enter__(self) -> Load:
        callers = [(self._call, (kind,)) for kind in self._kinds]
        callers += [(self._call, (self._kinds[2],)), (self._generate, ()), (self._misbehave, ())]
        self._threads = [threading.Thread(target=self._watch, args=caller) for caller in callers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, call, arguments) -> None:
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001: a thread's failure is the test's
            self.errors.append(f"{call.__name__}{arguments}: {error!r}")

    def _prompt(self, tokens: int) -> list[int]:
        """Returns one of a few beginnings, and an end of its own."""
        start = 4000 * self._random.randrange(3)
        own_end = [self._random.randrange(VOCABULARY) for _ in range(tokens // 4)]
        return [256, *self._text[start : start + tokens - len(own_end) - 1], *own_end]

    def _call(self, kind) -> None:
        tenant, policy, tokens, pause = kind
        with self._shown.prefill_client() as client:
            while not self._stop.is_set():
                try:
                    arguments = {"attention": Attention(policy), "metadata": (("x-tenant", tenant),)}
                    with client.prefill(self._prompt(tokens), layout=Layout(block_tokens=64), **arguments) as stream:
                        for _ in stream:
                            pass
                except PrefilldError as error:
                    if not error.retryable:  # a tenant's limit was reached, as one of them is meant to
                        raise
                self._stop.wait(pause)

    def _generate(self) -> None:
        with DecodeClient(self._shown.decode.address) as client:
            while not self._stop.is_set():
                list(client.generate(self._prompt(600), max_new_tokens=4))
                self._stop.wait(0.2)

    def _misbehave(self) -> None:
        """Sends requests that are invalid, and some that it gives up."""
        with self._shown.prefill_client() as client:
            while not self._stop.wait(0.3):
                with contextlib.suppress(PrefilldError):
                    client.prefill([10**6]).close()
                with contextlib.suppress(PrefilldError):
                    client.submit(self._prompt(2000)).cancel()


