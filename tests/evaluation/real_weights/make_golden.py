#!/usr/bin/env python3
"""Writes what Hugging Face transformers computes with the real weights: golden.json, for real_weights_test.py.

    python3 tests/evaluation/real_weights/make_golden.py --model FOLDER --texts FOLDER

The text is the beginning of Northanger Abbey (public domain), which is a text for calibration. transformers computes in
fp32, with the weights of the folder. Needs torch, transformers and numpy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import texts

GOLDEN = Path(__file__).with_name("golden.json")
TEXT_TOKENS = 2048
GREEDY_TOKENS = 16
BOOK = "NORTHANGER ABBEY"


def text_ids(folder: Path) -> list[int]:
    held = texts.load(folder, "calibration")
    first = next(i for i, about in enumerate(held.about) if about["files"][0].endswith(BOOK))
    return held.ids(first, TEXT_TOKENS)


def computed(model_folder: Path, ids: list[int]) -> dict:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        own = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
        best = logprobs[:-1].amax(-1).numpy()
        top = logprobs[-1].topk(10)
        made = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=GREEDY_TOKENS, min_new_tokens=GREEDY_TOKENS, pad_token_id=0,
        )  # fmt: skip
    return {
        "transformers": transformers.__version__,
        "nats_per_token": round(-float(own.mean()), 6),
        "ids": ids,
        "logprobs": np.round(own, 4).tolist(),
        "best_logprobs": np.round(best, 4).tolist(),
        "next_top": [[int(i), round(float(p), 4)] for p, i in zip(*top)],
        "greedy": made[0, len(ids) :].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder, of get_model.py")
    parser.add_argument("--texts", type=Path, required=True, help="folder of prepare_texts.py")
    args = parser.parse_args()
    golden = computed(args.model, text_ids(args.texts))
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in golden.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
    print(f"{golden['nats_per_token']} nats a token, transformers {golden['transformers']}")


if __name__ == "__main__":
    main()
