#!/usr/bin/env python3
"""Measures what the type of KV on the wire does to the text that follows a prompt.

    python3 tests/evaluation/real_weights/measure_kv.py --prefilld build/release/bin/prefilld --model FOLDER \
        --texts FOLDER --out build/kv_types.json [--texts_used 8] [--layouts bf16 fp8_e4m3:per_token:128]

A real prefilld computes the prompt and sends its KV; transformers, in fp32, fills its cache with what arrived
(prefilld.transformers) and reads the tokens that follow in one pass over it. Each layout is compared with KV in fp32,
text by text. The prompt's attention is exact, so that the type alone makes the difference, and the server keeps the
prompt in its prefix cache from one layout to the next. Results are written after every text, and the same command goes
on where it was stopped. Needs torch, transformers and the packages of the Python client (grpcio, protobuf, numpy,
xxhash).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "client" / "python")]
import intervals  # noqa: E402
import live_processes  # noqa: E402
import texts  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from prefilld import Attention, Layout, PrefillClient  # noqa: E402
from prefilld.transformers import prefill_cache  # noqa: E402

EXACT = "fp32"


def layout_of(name: str) -> Layout:
    """fp16, or fp8_e4m3:per_block:16 with its scales and the tokens of a block."""
    dtype, *rest = name.split(":")
    if not rest:
        return Layout(block_tokens=128, dtype=dtype)
    scales, block_tokens = rest
    return Layout(block_tokens=int(block_tokens), dtype=dtype, scales=scales)


class Reader:
    """Reads what follows a prompt, from a cache that came in some layout."""

    def __init__(self, client: PrefillClient, folder: Path, timeout: float):
        self._client, self._timeout = client, timeout
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def nats(self, prompt: list[int], following: list[int], layout: Layout) -> list[float]:
        """Returns what each of the following tokens costs."""
        asked = {"layout": layout, "attention": Attention("dense"), "timeout": self._timeout}
        with torch.no_grad():
            cache = prefill_cache(self._client, self._model, torch.tensor([prompt]), **asked)
            # The cache lacks the prompt's last token, whose logits are those of the first that follows.
            fed = torch.tensor([[prompt[-1], *following[:-1]]])
            logits = self._model(input_ids=fed, past_key_values=cache).logits[0].double()
        return (-logits.log_softmax(-1).gather(1, torch.tensor(following)[:, None])[:, 0]).tolist()


def summary(means: dict[str, dict[str, float]]) -> dict:
    """means: nats a token, by text and layout."""
    cells = {}
    for name in dict.fromkeys(name for of_text in means.values() for name in of_text if name != EXACT):
        lost = [of_text[name] - of_text[EXACT] for of_text in means.values() if name in of_text]
        mean = intervals.mean(lost)
        cells[name] = {
            "texts": len(lost),
            "perplexity_to_fp32": {key: round(math.exp(value), 5) for key, value in vars(mean).items()},
            "worst_text": round(math.exp(max(lost)), 5),
        }
    return cells


def measure(args: argparse.Namespace, programs: live_processes.Programs) -> None:
    judged = texts.load(args.texts, "judging")
    subject = {"model": args.model.name, "texts_digest": judged.digest, "prompt_tokens": args.prompt_tokens,
               "following_tokens": args.following_tokens}  # fmt: skip
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    if before and before["subject"] != subject:
        raise ValueError(f"{args.out} is of {before['subject']}, not of {subject}")
    means: dict[str, dict[str, float]] = before.get("nats_per_token", {})
    flags = ("--metrics_listen=", f"--device={args.device}", f"--prefix_cache_bytes={args.prefix_cache_bytes}")
    address = programs.start(args.prefilld, args.model, *flags)
    with PrefillClient(address) as client:
        reader = Reader(client, args.model, args.timeout)
        for index in range(min(args.texts_used, len(judged.about))):
            ids = judged.ids(index, args.prompt_tokens + args.following_tokens)
            of_text = means.setdefault(str(index), {})
            for name in [EXACT, *args.layouts]:
                if name in of_text:
                    continue
                begin = time.monotonic()
                nats = reader.nats(ids[: args.prompt_tokens], ids[args.prompt_tokens :], layout_of(name))
                of_text[name] = round(sum(nats) / len(nats), 7)
                print(f"text {index}, {name}: {of_text[name]} nats, {time.monotonic() - begin:.0f} s", flush=True)
            result = {"subject": subject, "layouts": summary(means), "nats_per_token": means}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary(means), indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefilld", type=Path, required=True, help="the server program")
    parser.add_argument("--model", type=Path, required=True, help="model folder, of get_model.py")
    parser.add_argument("--texts", type=Path, required=True, help="folder of prepare_texts.py")
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--texts_used", type=int, default=8, help="how many texts (%(default)s)")
    parser.add_argument("--prompt_tokens", type=int, default=7168)
    parser.add_argument("--following_tokens", type=int, default=512)
    parser.add_argument("--device", default="auto", help="of the server: auto, cpu or cuda")
    parser.add_argument("--prefix_cache_bytes", type=int, default=1 << 30, help="of the server (%(default)s)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one prompt (%(default)s)")
    parser.add_argument("--layouts", nargs="+", metavar="DTYPE[:SCALES:BLOCK_TOKENS]",
                        default=["bf16", "fp8_e4m3:per_token:128", "fp8_e4m3:per_block:16", "fp8_e4m3:per_block:128"],
                        help="compared with fp32 (%(default)s)")  # fmt: skip
    args = parser.parse_args()
    with live_processes.Programs() as programs:
        measure(args, programs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
