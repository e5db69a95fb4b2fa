#!/usr/bin/env python3
"""Measures PyTorch's attention on the shapes of `prefill-bench --mode=attention`, for comparison.

    sdpa.py [--tokens 8192,32768,131072] [--json OUT]

Causal bf16 forward on random normal data, with the cuDNN and FlashAttention-2 back ends. The figures are medians of
CUDA-event timings.
"""
import argparse
import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def median_ms(run, runs):
    times = []
    for i in range(-2, runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= 0:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for tokens in map(int, args.tokens.split(",")):
        for heads, kv_heads in ((28, 4), (32, 8)):
            shape = dict(device="cuda", dtype=torch.bfloat16)
            q = torch.randn(1, heads, tokens, 128, **shape)
            k, v = torch.randn(2, 1, kv_heads, tokens, 128, **shape)
            for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)):
                with sdpa_kernel(backend):
                    ms = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), args.runs)
                tflops = 2 * heads * 128 * tokens**2 / ms / 1e9
                rows.append(dict(what=name, tokens=tokens, heads=f"{heads}/{kv_heads}", median_ms=ms, tflops=tflops))
                print(f"{name:18} {tokens} tokens {heads}/{kv_heads} d128 {ms:10.3f} ms  {tflops:6.1f} TFLOP/s", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(dict(device=torch.cuda.get_device_name(), torch=torch.__version__, rows=rows), f, indent=1)


if __name__ == "__main__":
    main()
