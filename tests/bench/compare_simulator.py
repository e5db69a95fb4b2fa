#!/usr/bin/env python3
"""Compares prefill-simulator with a real prefilld: the same trace goes through both.

    PYTHONPATH=client/python tests/bench/compare_simulator.py BIN_DIR MODEL --trace=trace.csv --server_flags=--device=cuda

For each rule of --scheduling a server is started, `prefill-cli bench` sends it the trace, and the simulator gets the
same trace. The server is measured (measure_layers.py) before and after the trace, and the simulator takes the mean
of both. No KV is asked for, since the simulator knows none. It prints the times to the first token of both, what the
simulated ones are of the measured ones (of all requests, and of every group of lengths), and what the second
measurement took of the first: where that is far from 1, something else used the machine, and the comparison says
little. Requests that were refused are counted, and stand behind all others (first_tokens.py).
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import measure_layers
from first_tokens import NEVER, mean_of_report, percentile_of_report, refused_of_report, shown
from prefilld import PrefillClient

COMPARED = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@contextlib.contextmanager
def running_server(bin_dir: Path, model: str, flags: list[str]) -> Iterator[str]:
    """Starts prefilld on a free port and yields its address."""
    with tempfile.TemporaryDirectory() as folder:
        ports, log = Path(folder, "ports"), Path(folder, "log")
        command = [bin_dir / "prefilld", f"--model={model}", "--listen=127.0.0.1:0", "--metrics_listen="]
        with log.open("w") as stderr:
            server = subprocess.Popen([*command, f"--port_file={ports}", *flags], stderr=stderr)
        try:
            while not ports.exists():
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.05)
            yield f"127.0.0.1:{ports.read_text().split('grpc=')[1].split()[0]}"
        finally:
            server.terminate()
            server.wait()


def run_json(command: list) -> dict:
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def times(report: dict) -> dict[str, float]:
    return {"mean": mean_of_report(report)} | {n: percentile_of_report(report, share) for n, share in COMPARED.items()}


def shares(simulated: dict[str, float], measured: dict[str, float]) -> dict[str, float | str]:
    return {
        name: "refused" if NEVER in (simulated[name], of) else round(simulated[name] / of, 3)
        for name, of in measured.items()
    }


def mean_profile(before: dict, after: dict) -> dict:
    """Returns a profile with the mean times of two measurements of the same server."""
    prompts = [
        {**first, **{name: (first[name] + second[name]) / 2 for name in first if name.endswith("_us")}}
        for first, second in zip(before["prompts"], after["prompts"], strict=True)
    ]
    return {**before, "prompts": prompts, "request_us": (before["request_us"] + after["request_us"]) / 2}


def layer_us(profile: dict) -> float:
    return sum(prompt["layer_us"] for prompt in profile["prompts"])


def compare(args: argparse.Namespace, scheduling: str) -> dict:
    flags = [f"--scheduling={scheduling}", f"--queue_capacity={args.queue_capacity}", *args.server_flags]
    load = [f"--trace={args.trace}", f"--speedup={args.speedup}", f"--num_requests={args.num_requests}",
            "--json", f"--policy={args.policy}"]  # fmt: skip
    policies = ["dense", "share"] if args.policy == "auto" else [args.policy]
    with running_server(args.bin_dir, args.model, flags) as address, PrefillClient(address) as client:
        before = measure_layers.profile(client, policies, 16, args.longest, args.repeats)
        measured = run_json(
            [args.bin_dir / "prefill-cli", "bench", f"--server={address}", "--quiet", "--last_blocks=0", *load]
        )
        after = measure_layers.profile(client, policies, 16, args.longest, args.repeats)
    with tempfile.NamedTemporaryFile("w+") as file:
        json.dump(mean_profile(before, after), file)
        file.flush()
        simulated = run_json(
            [args.bin_dir / "prefill-simulator", f"--profile={file.name}", f"--scheduling={scheduling}",
             f"--queue_capacity={args.queue_capacity}", *load]  # fmt: skip
        )
    lengths = {
        group: shares(times(simulated["by_length"][group]), times(of_group)) | {"requests": of_group["requests"]}
        for group, of_group in measured["by_length"].items()
    }
    return {
        "measured_ms": {name: shown(value) for name, value in times(measured).items()},
        "simulated_ms": {name: shown(value) for name, value in times(simulated).items()},
        "simulated_of_measured": shares(times(simulated), times(measured)),
        "simulated_of_measured_by_length": lengths,
        "refused": {"measured": refused_of_report(measured), "simulated": refused_of_report(simulated)},
        "layers_after_of_before": round(layer_us(after) / layer_us(before), 3),
        "ends": {"measured": measured["ends"], "simulated": simulated["ends"]},
        "done": {"measured": measured["done"], "simulated": simulated["done"]},
        "sent_late_p99_ms": measured["sender"]["late_ms"]["p99"],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin_dir", type=Path, help="the build's folder of programs")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--speedup", type=float, default=1.0)
    parser.add_argument("--num_requests", type=int, default=0, help="of the trace; 0: all")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--scheduling", nargs="+", default=["turns", "fifo"])
    parser.add_argument("--queue_capacity", type=int, default=4096)
    parser.add_argument("--longest", type=int, default=0, help="of the lengths that are measured; 0: the server's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server_flags", nargs="*", default=[])
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    json.dump({scheduling: compare(args, scheduling) for scheduling in args.scheduling}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
