#!/usr/bin/env python3
"""Fetches the KV cache of a text from prefilld, then has a decode worker continue the text.

    PYTHONPATH=client/python python3 client/python/examples/prefill_and_generate.py \
        --server localhost:50051 --worker localhost:50052 --model model/tiny --text "Once upon a time"

The folder of the model that is served says how text becomes tokens (prefilld.text_tokens). Without it, --token_ids.
"""

import argparse
import time

from prefilld import Attention, DecodeClient, Layout, PrefillClient, to_float32
from prefilld.text_tokens import NoTokenizer, TextStream, open_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill a text, then continue it.")
    parser.add_argument("--server", default="localhost:50051", help="host:port of prefilld")
    parser.add_argument("--worker", default=None, help="host:port of a decode worker; none: prefill only")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--text", help="needs --model")
    prompt.add_argument("--token_ids", type=int, nargs="+")
    parser.add_argument("--model", help="folder of the model that is served")
    parser.add_argument("--policy", default=None, choices=["dense", "vertical_slash", "share", "auto"])
    args = parser.parse_args()
    text = None
    if args.text is None:
        tokens = args.token_ids
    elif args.model is None:
        parser.error("--text needs --model: only the model's folder says which tokens a text has")
    else:
        try:
            text = open_tokens(args.model)
        except NoTokenizer as error:
            parser.error(str(error))
        tokens = text.encode(args.text)

    with PrefillClient(args.server) as client:
        info = client.server_info()
        print(f"{info.model_name} on {info.device}: {info.num_layers} layers, {info.num_kv_heads} KV heads")
        begin = time.monotonic()
        with client.prefill(tokens, layout=Layout(order="hnd"), attention=Attention(args.policy)) as stream:
            for blocks in stream:
                norm = abs(to_float32(blocks.keys)).mean()
                print(
                    f"{1e3 * (time.monotonic() - begin):8.1f} ms  layer {blocks.layer}: keys {blocks.keys.shape}, "
                    f"mean magnitude {norm:.3f}, sent after {blocks.layers_computed} layers"
                )
            result = stream.result
        print(
            f"first token {result.first_token.token_id}, density {result.total.density:.3f}, "
            f"{result.kv_bytes} bytes of KV"
        )

    if args.worker:
        with DecodeClient(args.worker) as client:
            stream = TextStream(text.decode) if text else None
            for token in client.generate(tokens, 32, attention=Attention(args.policy)):
                print(stream.add(token.id) if stream else f"{token.id} ", end="", flush=True)
        print(stream.rest() if stream else "")


if __name__ == "__main__":
    main()
