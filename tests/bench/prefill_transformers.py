"""Measures the time to first token of a checkpoint in Hugging Face transformers, to compare with prefilld's.

    prefill_transformers.py MODEL_FOLDER PROMPT_FILE [--device cpu|cuda] [--threads 2] [--dtype bfloat16]
                            [--repeats 3] [--tokens 8192,32768] [--json FILE]

A PROMPT_FILE that ends in .json is a list of token ids, cut to each of --tokens. The tokens of any other file are its
bytes after one beginning-of-text token, as for the embedded model. Prints one line per run, then the best and the
median per length. A run is the whole forward pass with its KV cache, logits of the last position alone, and SDPA
attention (by cuDNN on a GPU).
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import time

import torch
import transformers


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("prompt", type=pathlib.Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[])
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def read_prompt(path, model):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return [model.config.bos_token_id, *path.read_bytes()]


def attention_backend(device):
    if device == "cpu":
        return contextlib.nullcontext()
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


def seconds_of(model, tokens):
    begin = time.perf_counter()
    output = model(tokens, use_cache=True, logits_to_keep=1)
    first = int(output.logits[0, -1].argmax())  # waits for the device
    return time.perf_counter() - begin, first


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    )
    model = model.to(arguments.device).eval()
    prompt = read_prompt(arguments.prompt, model)
    rows = []
    with torch.inference_mode(), attention_backend(arguments.device):
        for length in arguments.tokens or [len(prompt)]:
            tokens = torch.tensor([prompt[:length]], device=arguments.device)
            if arguments.device == "cuda":
                seconds_of(model, tokens)  # chooses algorithms, grows the allocator's pools
            seconds = []
            for _ in range(arguments.repeats):
                spent, first = seconds_of(model, tokens)
                seconds.append(spent)
                print(f"  transformers {arguments.dtype} {length} tokens: {spent:.3f} s, first token {first}")
            rows.append(
                {
                    "engine": f"transformers {transformers.__version__}, torch {torch.__version__}",
                    "dtype": arguments.dtype,
                    "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
                    "threads": arguments.threads,
                    "tokens": length,
                    "best_s": round(min(seconds), 3),
                    "median_s": round(statistics.median(seconds), 3),
                }
            )
            print(json.dumps(rows[-1]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
