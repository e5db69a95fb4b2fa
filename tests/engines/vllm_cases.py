"""One case of vllm_end_to_end.py, which starts this in a process of its own: one engine, many prompts.

    python3 tests/engines/vllm_cases.py CASE BIN_DIR MODEL DTYPE OUT.json
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

from faulty_proxy import FaultyProxy
from prompts_of_engines import ROOT, prompts

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind", PYTHONPATH=str(ROOT / "client" / "python"),
)  # fmt: skip
sys.path.insert(0, str(ROOT / "client" / "python"))
import live_processes  # noqa: E402

NEW_TOKENS = 48
LOGPROBS = 20  # likeliest tokens whose log-probabilities are told
TIMEOUT_S = 40  # of a load; those that stall take so long


class Prefilld(live_processes.Programs):
    """A prefilld on a port that it keeps when it is started again."""

    def __init__(self, bin_dir: Path, model: Path):
        super().__init__()
        self._program, self._model = bin_dir / "prefilld", model
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def run(self) -> None:
        self.address = self.start(
            self._program, self._model, f"--listen=127.0.0.1:{self.port}", "--metrics_listen=127.0.0.1:0", "--cpu_threads=1"
        )
        name = f"prefilld.{len(self._started) - 1}.ports"
        self._page = re.search(r"metrics=(\d+)", (Path(self._folder.name) / name).read_text())[1]  # a port

    def kill(self) -> None:
        self._started[-1].kill()
        self._started[-1].wait()

    def kill_when_it_computes(self) -> threading.Thread:
        """Kills the server once it has computed a layer of the next prompt."""
        steps = self.count("prefilld_steps_total")

        def await_layer() -> None:
            while self.count("prefilld_steps_total") == steps:
                time.sleep(0.005)
            self.kill()

        thread = threading.Thread(target=await_layer, daemon=True)
        thread.start()
        return thread

    def count(self, pattern: str) -> float:
        """Sums the metrics whose lines match."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self._page}/metrics").read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(pattern, line))


class Engine:
    def __init__(
        self, model: Path, dtype: str, connector: dict | None = None, policy: str = "recompute",
        module: tuple[str, str] = ("prefilld.vllm", "PrefilldConnector"), **options,
    ):  # fmt: skip
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector=module[1], kv_role="kv_consumer", kv_connector_module_path=module[0],
                kv_load_failure_policy=policy,
                kv_connector_extra_config={"policy": "dense", "prefill_allow": ["127.0.0.1:*"], **connector},
            )  # fmt: skip
        begin = time.monotonic()
        made = dict(enable_prefix_caching=False, max_model_len=4096, max_num_batched_tokens=4096)
        self._llm = LLM(str(model), skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, **{**made, **options})
        self.start_s = round(time.monotonic() - begin, 1)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self._llm.llm_engine.engine_core.shutdown()  # else Python waits for its processes for ever

    def generate(self, ids: list[list[int]], params: dict | None = None) -> list:
        """Returns the outputs, or what was raised."""
        from vllm import SamplingParams

        extra = None if params is None else {"kv_transfer_params": params}
        sampling = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, extra_args=extra, logprobs=LOGPROBS
        )
        return self._llm.generate([{"prompt_token_ids": i} for i in ids], sampling, use_tqdm=False)

    def one(self, ids: list[int], params: dict | None = None) -> dict:
        begin = time.monotonic()
        (output,) = self.generate([ids], params)
        return {
            "tokens": list(output.outputs[0].token_ids),
            "first_logprobs": {str(token): made.logprob for token, made in self._first_logprobs(output).items()},
            "finish": output.outputs[0].finish_reason,
            "cached": output.num_cached_tokens,
            "seconds": round(time.monotonic() - begin, 3),
        }

    @staticmethod
    def _first_logprobs(output) -> dict:
        told = output.outputs[0].logprobs
        return told[0] if told else {}  # a request that failed has none


def at(port: int, **more) -> dict:
    return {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": port, **more}


def plain(bin_dir: Path, model: Path, dtype: str, ids: dict[str, list[int]]) -> dict:
    with Engine(model, dtype) as engine:
        return {"start_s": engine.start_s, "prompts": {name: engine.one(i) for name, i in ids.items()}}


def connected(bin_dir: Path, model: Path, dtype: str, ids: dict[str, list[int]], **options) -> dict:
    """Every prompt once blocking and once asynchronously, then all at once."""
    with Prefilld(bin_dir, model) as server:
        server.run()
        with Engine(model, dtype, {}, **options) as engine:
            result = {"start_s": engine.start_s}
            for mode in ("sync", "async"):
                params = at(server.port, load_async=mode == "async")
                result[mode] = {name: engine.one(i, params) for name, i in ids.items()}
            for name, series in (("prefills", "prefilld_requests_total"), ("further_receivers", "prefilld_receivers_total")):
                result[f"{name}_for_each_prompt"] = server.count(series) / 2 / len(ids)
            begin = time.monotonic()
            outputs = engine.generate(list(ids.values()), at(server.port))
            result["together"] = {name: {"tokens": list(o.outputs[0].token_ids)} for name, o in zip(ids, outputs)}
            result["together_s"] = round(time.monotonic() - begin, 2)
            return result


def tensor_parallel(bin_dir: Path, model: Path, dtype: str, ids: dict[str, list[int]]) -> dict:
    return connected(bin_dir, model, dtype, ids, tensor_parallel_size=2)


def prefix(bin_dir: Path, model: Path, dtype: str, ids: dict[str, list[int]]) -> dict:
    """vLLM's own cache has the beginning of a prompt: the rest alone is sent. The server's address is configured."""
    whole = ids["text/2500"]
    with Prefilld(bin_dir, model) as server:
        server.run()
        connector = {"prefill_address": server.address, "min_prompt_tokens": 500}
        with Engine(model, dtype, connector, enable_prefix_caching=True) as engine:
            result = {}
            # Below min_prompt_tokens vLLM prefills; then two thirds are missing; then less than the minimum is.
            for name, end in (("short", 400), ("long", 1600), ("longer", 2500), ("shorter_than_cached", 2000)):
                before = server.count("prefilld_kv_bytes_total"), server.count("prefilld_requests_total")
                answer = engine.one(whole[:end])
                result[name] = answer | {
                    "prompt": end,
                    "kv_bytes": server.count("prefilld_kv_bytes_total") - before[0],
                    "prefills": server.count("prefilld_requests_total") - before[1],
                }
            return result


def faults(bin_dir: Path, model: Path, dtype: str, ids: dict[str, list[int]], policy: str) -> dict:
    """Loads that fail in every way; the engine must answer, or say that it failed, and go on.

    Of the connections that are cut midway, each brings a frame of the short prompt (0.26 MB), and none of the other.
    """
    cases = {name: ids[name] for name in ("number_string/700", "text/129")}
    after = ids["text/257"]
    with Prefilld(bin_dir, model) as server:
        server.run()
        with Engine(model, dtype, {"timeout_s": TIMEOUT_S}, policy) as engine:
            result = {}
            for mode in (False, True):
                kind = "async" if mode else "sync"
                for fault in ("refused", "midway", "midway_once", "timeout"):
                    for name, i in cases.items():
                        proxy = FaultyProxy(
                            server.address, 0 if fault == "refused" else 300_000, fault == "timeout",
                            faults=1 if fault == "midway_once" else None,
                        )  # fmt: skip
                        before = server.count("prefilld_prompt_tokens_count")
                        with proxy:
                            port = 1 if fault == "refused" else proxy.port
                            answer = engine.one(i, at(port, load_async=mode))
                        prefills = server.count("prefilld_prompt_tokens_count") - before
                        result[f"{kind} {fault} {name}"] = answer | {
                            "connections": proxy.connections, "prefills": prefills,
                        }  # fmt: skip
                result[f"{kind} after"] = engine.one(after, at(server.port, load_async=mode)) | {"prompt": "text/257"}
                for mistake in ({"remote_port": "nowhere"}, {"attention": {"policy": "sparse"}}, {"attention": {"gama": 1}}):
                    key = f"{kind} mistake {json.dumps(mistake)}"
                    result[key] = engine.one(after, {**at(server.port, load_async=mode), **mistake}) | {"prompt": "text/257"}
                killing = server.kill_when_it_computes()
                result[f"{kind} killed pass_key/3000"] = engine.one(ids["pass_key/3000"], at(server.port, load_async=mode))
                killing.join()
                result[f"{kind} away text/257"] = engine.one(after, at(server.port, load_async=mode))
                server.run()
                time.sleep(5)  # gRPC connects again within about 2 s
                result[f"{kind} restarted"] = engine.one(after, at(server.port, load_async=mode)) | {"prompt": "text/257"}
            return result


def recompute(*arguments) -> dict:
    return faults(*arguments, policy="recompute")


def fail(*arguments) -> dict:
    return faults(*arguments, policy="fail")


def record(bin_dir: Path, model: Path, dtype: str, ids: dict[str, list[int]]) -> dict:
    """Writes down how the engine calls the connector: blocking, asynchronous, with a cached prefix, and failing loads."""
    os.environ["PYTHONPATH"] += f":{Path(__file__).parent}"
    with Prefilld(bin_dir, model) as server:
        server.run()
        module = ("recording_connector", "RecordingConnector")
        with Engine(model, dtype, {"retries": 0}, module=module, enable_prefix_caching=True) as engine:
            whole, other = ids["text/1000"], ids["number_string/700"]
            for prompt, params in (
                (whole[:300], at(server.port, load_async=False)),
                (whole[:700], at(server.port)),  # vLLM has the first two blocks
                (whole[:200], None),
                (other[:300], at(1)),
                (other[:400], at(1, load_async=False)),
            ):
                engine.one(prompt, params)
            return {}


def http(bin_dir: Path, model: Path, dtype: str, ids: dict[str, list[int]]) -> dict:
    """vLLM's OpenAI server. The expected tokens are those of the case `plain`, in PREFILLD_EXPECTED."""
    import vllm_http_case

    expected = {n: a["tokens"] for n, a in json.loads(Path(os.environ["PREFILLD_EXPECTED"]).read_text()).items()}
    with Prefilld(bin_dir, model) as server:
        server.run()
        with vllm_http_case.Server(model, dtype) as engine:
            return vllm_http_case.ask(engine, server, ids, expected, NEW_TOKENS)


CASES = {f.__name__: f for f in (plain, connected, tensor_parallel, prefix, recompute, fail, http, record)}


def main() -> None:
    case, bin_dir, model, dtype, out = sys.argv[1:]
    longest = int(os.environ.get("PREFILLD_LONGEST", "4096"))
    ids = {name: tokens for name, tokens in prompts(Path(model)).items() if len(tokens) <= longest}
    made = CASES[case](Path(bin_dir).resolve(), Path(model).resolve(), dtype, ids)
    Path(out).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
