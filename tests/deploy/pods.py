"""Starts the containers of the manifests here: same programs, same flags, other addresses and folders."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from rendering import KUSTOMIZATIONS, ROOT, containers_of, of_kind, program_of, render

sys.path[:0] = [str(ROOT / "tests" / "evaluation"), str(ROOT / "tests" / "gateway"), str(ROOT / "client" / "python")]
import live_processes  # noqa: E402
from gateway_process import GatewayProcess  # noqa: E402

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
SERVING = b"\x08\x01"  # HealthCheckResponse{status = SERVING}
MODEL = live_processes.MODEL


@dataclass
class Pod:
    """A container that runs. ports: where each port of the manifest is here."""

    container: dict
    ports: dict[int | str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None


def containers(program: str) -> list[dict]:
    """Returns the containers of all overlays that run a program, each way of starting it once."""
    found = {}
    for folder in KUSTOMIZATIONS:
        for deployment in of_kind(render(folder), "Deployment"):
            for container in containers_of(deployment):
                if program_of(container) == program:
                    found.setdefault(tuple(localised(container["args"], "TLS", "PEER")), container)
    return list(found.values())


def is_tls(container: dict) -> bool:
    return any(argument.startswith("--tls_cert=") for argument in container["args"])


def localised(arguments: list[str], tls: str, peer: str) -> list[str]:
    """Returns the flags with which a container's program runs here. tls: the folder of the Secret; peer: prefilld."""
    here = []
    for argument in arguments:
        name, value = argument.split("=", 1)
        value = value.replace("/tls/", f"{tls}/")
        value = {
            "--model": str(MODEL),
            "--listen": "127.0.0.1:0",
            "--metrics_listen": "127.0.0.1:0",
            "--device": "cpu",  # of cuda
            "--prefill_address": peer,
            "--prefill": peer,
        }.get(name, value)
        here.append(f"{name}={value}")
    return here


class Pods(live_processes.Programs):
    def __init__(self, bin_dir: Path):
        super().__init__()
        self._bin_dir = bin_dir
        self._gateways: list[GatewayProcess] = []

    def __exit__(self, *exception) -> None:
        for gateway in self._gateways:
            gateway.__exit__()
        super().__exit__(*exception)

    def run(self, container: dict, tls: str = "", peer: str = "") -> Pod:
        """Returns once the program is ready. Raises RuntimeError with its log if it refuses a flag."""
        own = ("--model", "--listen")  # Programs and GatewayProcess give these
        flags = [f for f in localised(container["args"], tls, peer) if not f.startswith(own)]
        if program_of(container) == "prefilld-gateway":
            gateway = GatewayProcess(MODEL, *flags)
            gateway.__enter__()
            self._gateways.append(gateway)
            gateway.wait_until_ready()
            address = {"http": f"127.0.0.1:{gateway.port}"}
            process = gateway.process
        else:
            at = self.start(self._bin_dir / program_of(container), MODEL, *flags)
            address = {"grpc": at, "metrics": self.metrics_address(at)}
            process = self.process_at(at)
        pod = Pod(container, process=process)
        for port in container["ports"]:
            pod.ports[port["name"]] = pod.ports[port["containerPort"]] = address[port["name"]]
        return pod

    def ask(self, pod: Pod, probe: dict, tls: str = "") -> str:
        """Asks as the kubelet would. Returns "" if the probe succeeds, else why not."""
        if "grpc" in probe:
            return health(pod.ports[probe["grpc"]["port"]], probe["grpc"].get("service", ""))
        if "httpGet" in probe:
            try:
                with urllib.request.urlopen(
                    f"http://{pod.ports[probe['httpGet']['port']]}{probe['httpGet']['path']}", timeout=10
                ):
                    return ""
            except OSError as error:
                return str(error)
        if "tcpSocket" in probe:
            with socket.create_connection(pod.ports[probe["tcpSocket"]["port"]].rsplit(":", 1), timeout=10):
                return ""
        program, *arguments = probe["exec"]["command"]
        here = [a.replace("/tls/", f"{tls}/") for a in arguments]
        here = [re.sub(r"^(--server=)localhost:(\d+)$", lambda m: m[1] + pod.ports[int(m[2])], a) for a in here]
        done = subprocess.run([self._bin_dir / program, *here], capture_output=True, text=True, timeout=30)
        return done.stderr if done.returncode else ""


def health(address: str, service: str) -> str:
    """Makes one grpc.health.v1 check in plain text. Returns "" if the service serves, else why not."""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(b"\n" + bytes([len(service)]) + service.encode(), timeout=10)
        except grpc.RpcError as error:
            return error.code().name
    return "" if answer == SERVING else "NOT_SERVING"


def page_of(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        return page.read().decode()
