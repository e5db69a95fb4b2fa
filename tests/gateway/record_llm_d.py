#!/usr/bin/env python3
"""Records what llm-d's routing sidecar says to a gateway and to vLLM, for gateway_test.py to replay.

    python3 tests/gateway/record_llm_d.py SIDECAR build/release/bin > tests/gateway/llm_d_exchange.jsonl

SIDECAR is the program that github.com/llm-d/llm-d-routing-sidecar builds; what is kept was recorded from its commit
78051b8, built without its list of allowed hosts, which asks Kubernetes. The gateway and prefilld are real. vLLM is
played, because the sidecar only passes a request on to it. Each line has the client's request, the sidecar's prefill
call and the gateway's answer, and what the sidecar then sent to vLLM.
"""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gateway_process import GatewayProcess

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

CLIENT_REQUESTS = (
    ("/v1/completions", {"model": "tiny", "prompt": "The lighthouse keeper walks to the harbour. " * 12,
                         "max_tokens": 64, "temperature": 0.5, "logprobs": 3, "stream": True,
                         "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"model": "tiny", "prompt": [256, *b"The fisher has a lantern. " * 20], "n": 2}),
    ("/v1/chat/completions", {"model": "tiny", "max_completion_tokens": 32, "tool_choice": "auto",
                              "messages": [{"role": "system", "content": "You keep a lighthouse."},
                                           {"role": "user", "content": "Where is the lantern? " * 10}]}),
)  # fmt: skip


class Recorder(ThreadingHTTPServer):
    """Keeps what it is asked and answers. forward_to: the URL that answers instead; none: it plays vLLM."""

    def __init__(self, forward_to: str = ""):
        self.asked: list[dict] = []
        self.answered: list[dict] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                recorder.asked.append(json.loads(body))
                answer = b"{}"
                if forward_to:
                    request = urllib.request.Request(forward_to + self.path, body, {"Content-Type": "application/json"})
                    with urllib.request.urlopen(request) as reply:
                        answer = reply.read()
                recorder.answered.append(json.loads(answer))
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def main(sidecar: str, bin_dir: str) -> None:
    port = 18_765
    with live_processes.Programs() as programs:
        prefilld = programs.start(Path(bin_dir) / "prefilld", live_processes.MODEL, "--metrics_listen=")
        with GatewayProcess(live_processes.MODEL, f"--prefill={prefilld}") as gateway:
            gateway.wait_until_ready()
            before_gateway, vllm = Recorder(gateway.url), Recorder()
            flags = (f"--port={port}", f"--vllm-port={vllm.server_port}", "--secure-proxy=false", "--connector=nixlv2")
            process = subprocess.Popen([sidecar, *flags], stdout=sys.stderr, stderr=sys.stderr)
            try:
                time.sleep(2)
                for path, body in CLIENT_REQUESTS:
                    headers = {"Content-Type": "application/json",
                               "x-prefiller-host-port": f"127.0.0.1:{before_gateway.server_port}"}  # fmt: skip
                    url = f"http://127.0.0.1:{port}{path}"
                    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)).read()
                    exchange = {
                        "path": path,
                        "client_request": body,
                        "prefill_request": before_gateway.asked[-1],
                        "prefill_answer": before_gateway.answered[-1],
                        "decode_request": vllm.asked[-1],
                    }
                    print(json.dumps(exchange))
            finally:
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
