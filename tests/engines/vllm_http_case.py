"""The case `http` of vllm_cases.py: vLLM's OpenAI server, asked as routers ask it, and by clients that hang up."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from faulty_proxy import FaultyProxy

START_S = 900


def post(url: str, body: dict, timeout: float = 300) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return {"status": error.code, "error": error.read().decode()[:500]}


class PrefillPod(ThreadingHTTPServer):
    """Answers llm-d's prefill request at once with where the KV is to be had, as a gateway before prefilld would."""

    def __init__(self, prefill_port: int):
        pod = self
        self.asked: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                pod.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": None,
                          "remote_block_ids": None, "remote_host": "127.0.0.1", "remote_port": prefill_port}  # fmt: skip
                text = json.dumps({"choices": [], "kv_transfer_params": params}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Server:
    """vLLM's OpenAI server with the connector."""

    def __init__(self, model: Path, dtype: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        transfer = {"kv_connector": "PrefilldConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute",
                    "kv_connector_module_path": "prefilld.vllm",
                    "kv_connector_extra_config": {"policy": "dense", "prefill_allow": ["127.0.0.1:*"]}}  # fmt: skip
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "tiny",
            "--skip-tokenizer-init", "--dtype", dtype, "--enforce-eager", "--max-model-len", "4096", "--port",
            str(self._port), "--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer),
        ]  # fmt: skip

    def __enter__(self) -> Server:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="prefilld-vllm-http-")
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        end = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise RuntimeError(f"vLLM's server did not start:\n{Path(self._log.name).read_text()[-3000:]}") from None
                time.sleep(1)

    def __exit__(self, *_) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def count(self, metric: str) -> float:
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return sum(float(x.split()[-1]) for x in text.splitlines() if re.match(rf"{metric}(_total)?[{{ ]", x))


def ask(server: Server, prefill, ids: dict[str, list[int]], expected: dict[str, list[int]], num_tokens: int) -> dict:
    failures: list[str] = []
    url = f"{server.url}/v1/completions"

    def body(name, **more):
        return {"model": "tiny", "prompt": ids[name], "temperature": 0, "max_tokens": num_tokens, "ignore_eos": True,
                "return_token_ids": True, "detokenize": False, **more}  # fmt: skip

    def check(what, name, answer):
        found = (answer.get("choices") or [{}])[0].get("token_ids")
        if found != expected[name]:
            failures.append(f"http, {what}: {str(answer)[:300]}")

    at = {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": prefill.port}
    for name in ("text/129", "number_string/700", "key_value/1500"):
        check("completion", name, post(url, body(name, kv_transfer_params=at)))

    pod = PrefillPod(prefill.port)
    asked = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
             "remote_host": None, "remote_port": None}  # fmt: skip
    pod_url = f"http://127.0.0.1:{pod.server_port}/v1/completions"
    prefilled = post(pod_url, body("multi_needle/2048", max_tokens=1, stream=False, kv_transfer_params=asked))
    decode = body("multi_needle/2048", kv_transfer_params=prefilled["kv_transfer_params"])
    check("llm-d's exchange", "multi_needle/2048", post(url, decode))
    pod.shutdown()

    # The client hangs up while the KV is on its way.
    with FaultyProxy(prefill.address, 200_000, stall=True) as proxy:
        try:
            post(url, body("pass_key/3000", kv_transfer_params={**at, "remote_port": proxy.port}), timeout=5)
            failures.append("http, hanging up: an answer came")
        except OSError:
            pass
        end = time.monotonic() + 120
        while server.count("vllm:prefilld_cancelled_loads") < 1 and time.monotonic() < end:
            time.sleep(0.5)
    check("after hanging up", "text/257", post(url, body("text/257", kv_transfer_params=at)))
    counts = {n: server.count(f"vllm:prefilld_{n}") for n in ("loads", "failed_loads", "cancelled_loads", "loaded_tokens")}
    due = {"loads": 5, "failed_loads": 0, "cancelled_loads": 1, "loaded_tokens": 0}
    lengths = [len(ids[n]) for n in ("text/129", "number_string/700", "key_value/1500", "multi_needle/2048", "text/257")]
    due["loaded_tokens"] = sum(lengths)
    if counts != due:
        failures.append(f"http, metrics of vLLM: {counts}; due: {due}")
    return {"failures": failures, "metrics_of_vllm": counts}
