"""Time to first token of a checkpoint in Hugging Face transformers on the CPU, to stand beside prefilld's.

    prefill_transformers.py MODEL_FOLDER PROMPT_FILE [--threads 2] [--dtype bfloat16] [--repeats 3]

Tokens are the prompt's bytes after one beginning-of-text token, as for the embedded model. One line per run, then the
best: the whole forward pass with its KV cache, logits of the last position alone, SDPA attention.
"""

import argparse
import json
import pathlib
import time

import torch
import transformers


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("prompt", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    ).eval()
    tokens = torch.tensor([[model.config.bos_token_id, *arguments.prompt.read_bytes()]])
    seconds = []
    with torch.inference_mode():
        for _ in range(arguments.repeats):
            begin = time.perf_counter()
            output = model(tokens, use_cache=True, logits_to_keep=1)
            first = int(output.logits[0, -1].argmax())
            seconds.append(time.perf_counter() - begin)
            print(f"  transformers {arguments.dtype} {tokens.shape[1]} tokens: {seconds[-1]:.2f} s, first token {first}")
    print(
        json.dumps(
            {
                "engine": f"transformers {transformers.__version__}, torch {torch.__version__}",
                "dtype": arguments.dtype,
                "threads": arguments.threads,
                "tokens": tokens.shape[1],
                "best_s": round(min(seconds), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
