#!/usr/bin/env python3
"""Measures what a text's continuation loses when the prompt before it was cached under `share` instead of computed cold.

    python3 tests/engines/cached_continuation.py build/release/bin --model=FOLDER --texts a.txt b.txt

A prompt is --prompt_tokens of a text. Another prompt that begins with a part of it (--cached) and goes on with another
text is served before, so the part's KV was computed beside other queries than the prompt's. Then the prompt itself is
served twice: with that part from the prefix cache, and past the cache. Each time transformers takes the KV over the
wire, reads the next --next_tokens tokens of the text and says how likely it found each. So what is judged is what a
decode engine would go on with. Printed is exp(nats lost a token) of cached beside cold, with Student's 95 % interval
over the prompts, and of cold `share` beside cold `dense`, on the same tokens.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import intervals  # noqa: E402
import live_processes  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from prefilld import Attention, Layout, PrefillClient  # noqa: E402
from prefilld.transformers import prefill_cache  # noqa: E402

BLOCK = 128  # of the prefix cache


class Recording:
    """A client that remembers the result of its latest prompt."""

    def __init__(self, client: PrefillClient):
        self._client = client
        self._stream = None

    def prefill(self, tokens, **arguments):
        self._stream = self._client.prefill(tokens, **arguments)
        return self._stream

    @property
    def result(self):
        return self._stream.result


def tokens_of(path: Path, model: Path) -> list[int]:
    if json.loads((model / "config.json").read_text()).get("byte_tokens"):
        return list(path.read_bytes())
    return transformers.AutoTokenizer.from_pretrained(model)(path.read_text(errors="ignore"))["input_ids"]


def nats(model, cache, last: int, following: list[int]) -> float:
    """Returns the nats of all of `following`; the cache holds the prompt but its last token."""
    with torch.no_grad():
        logits = model(torch.tensor([[last, *following[:-1]]]), past_key_values=cache).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(following), reduction="sum").item()


def measure(client: Recording, model, prompt: list[int], following: list[int], other: list[int], part: float) -> dict:
    shared = int(part * len(prompt)) // BLOCK * BLOCK
    nothing = Layout(block_tokens=BLOCK, first_block=-(-len(prompt) // BLOCK))
    salt = f"{hash((tuple(prompt), part)):x}"
    before = prompt[:shared] + other[: len(prompt) - shared]
    with client.prefill(before, layout=nothing, attention=Attention("share"), cache_salt=salt) as stream:
        list(stream)

    def serve(policy: str, **arguments) -> float:
        ids = torch.tensor([prompt])
        cache = prefill_cache(client, model, ids, attention=Attention(policy), **arguments)
        return nats(model, cache, prompt[-1], following) / len(following)

    cached = serve("share", cache_salt=salt)
    if client.result.cached_tokens != shared:
        raise SystemExit(f"{client.result.cached_tokens} tokens were cached, not {shared}")
    cold = serve("share", bypass_prefix_cache=True)
    density = client.result.total.density
    return {"cached": cached, "cold": cold, "density": density, "dense": serve("dense", bypass_prefix_cache=True)}


def ratio(rows: list[dict], name: str, to: str) -> dict:
    lost = [row[name] - row[to] for row in rows]
    estimate = intervals.mean(lost)
    shown = {end: round(math.exp(nats), 5) for end, nats in vars(estimate).items()}
    return {**shown, "worst": round(math.exp(max(lost)), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin_dir", type=Path, help="the build's folder of programs")
    parser.add_argument("--model", type=Path, default=live_processes.MODEL)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--prompt_tokens", type=int, default=2000)
    parser.add_argument("--next_tokens", type=int, default=256)
    parser.add_argument("--cached", type=float, nargs="+", default=[0.5, 0.9], help="parts of the prompt")
    parser.add_argument("--most_prompts", type=int, default=40)
    args = parser.parse_args()
    length = args.prompt_tokens + args.next_tokens
    texts = [tokens_of(path, args.model) for path in args.texts]
    pieces = [text[at : at + length] for text in texts for at in range(0, len(text) - length + 1, length)]
    pieces = pieces[:: max(1, len(pieces) // args.most_prompts)][: args.most_prompts]
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with live_processes.Programs() as programs:
        server = programs.start(args.bin_dir / "prefilld", args.model, "--metrics_listen=", "--device=cpu",
                                f"--max_prompt_tokens={args.prompt_tokens}", f"--prefix_cache_bytes={1 << 30}")  # fmt: skip
        with PrefillClient(server) as client:
            for part in args.cached:
                rows = []
                for i, piece in enumerate(pieces):
                    prompt, following = piece[: args.prompt_tokens], piece[args.prompt_tokens :]
                    other = pieces[(i + len(pieces) // 2) % len(pieces)]
                    rows.append(measure(Recording(client), model, prompt, following, other, part))
                    print(part, i, rows[-1], file=sys.stderr, flush=True)
                print(json.dumps({
                    "model": args.model.name, "prompt_tokens": args.prompt_tokens, "cached": part,
                    "prompts": len(rows), "next_tokens": args.next_tokens,
                    "density": round(statistics.mean(row["density"] for row in rows), 3),
                    "cold_perplexity": round(math.exp(statistics.mean(row["cold"] for row in rows)), 4),
                    "cached_to_cold": ratio(rows, "cached", "cold"), "cold_to_dense": ratio(rows, "cold", "dense"),
                    "cached_to_dense": ratio(rows, "cached", "dense"),
                }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
