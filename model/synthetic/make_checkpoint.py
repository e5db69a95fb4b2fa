#!/usr/bin/env python3
"""Builds a synthetic checkpoint of a real model's shape whose heads attend like a trained model's.

Speed at 128k or 1M tokens depends on *where* heads look, and random weights look everywhere. Here
the structure is put in by construction, so that throughput, density and memory can be measured on
real shapes without real weights. Every number obtained from such a checkpoint is to be called
synthetic: it says nothing about answers.

    make_checkpoint.py SHAPE OUTPUT_DIR [--layers N] [--seed S]
    make_checkpoint.py --prompt N [--seed S] SHAPE > token_ids.json

SHAPE: qwen2.5-7b, llama-3.1-8b, or tiny (for tests). Needs numpy; writes bf16 safetensors, one
shard per layer, with config.json and head_clusters.json (clusters = head types of one KV head).

How it works. The residual stream stays close to the token embedding, because attention and MLP
outputs are scaled down; so each layer can read a token's features from its embedding:
  - topic: a unit vector shared by runs of token ids, so that segments of a prompt have a topic;
  - sink: a spike for token 0, which every prompt starts with;
  - column: a spike for token ids 1 .. 63, sprinkled over the prompt.
Queries and keys place features on the slowest rotary pairs, which turn little over a prompt, and
constants on the fast ones. A constant key against a constant query gives a logit that depends on
the distance alone: in phase it is a local band, with the query turned back by an offset it is a
slash. Llama has no QKV bias, so the constant comes from a feature that is 1 for every token.
Head types and their amplitudes follow what is seen in trained models: most heads local or
vertical, some slashes, a few that follow content, one nearly flat.
"""
import argparse
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SHAPES = {
    # The rotation is that of Qwen2.5-7B-Instruct-1M, which is ten times slower than Qwen2.5-7B-Instruct's.
    "qwen2.5-7b": dict(model_type="qwen2", hidden=3584, intermediate=18944, layers=28, heads=28,
                       kv_heads=4, head_dim=128, vocab=152064, theta=1e7, eps=1e-6, bias=True,
                       max_positions=1048576),
    "llama-3.1-8b": dict(model_type="llama", hidden=4096, intermediate=14336, layers=32, heads=32,
                         kv_heads=8, head_dim=128, vocab=128256, theta=5e5, eps=1e-5, bias=False,
                         max_positions=1048576),
    "tiny": dict(model_type="qwen2", hidden=256, intermediate=512, layers=4, heads=8, kv_heads=2,
                 head_dim=64, vocab=4096, theta=1e7, eps=1e-6, bias=True, max_positions=1048576),
}

NUM_TOPICS = 48
TOPIC_DIMS = 16
COLUMN_TOKENS = 64  # ids 1 .. 63 are columns, id 0 is the sink
# These dimensions of the embedding hold its features; the others hold noise.
ONE, SINK, COLUMN, TOPIC = 0, 1, 2, 3
FEATURE_DIMS = TOPIC + TOPIC_DIMS

# Peak logits per head type: local band, sink, columns, topic. The offsets of slashes are in tokens.
HEAD_TYPES = {
    "local": dict(band=17.0, sink=13.0, column=0.0, topic=0.0, offsets=(0,)),
    "vertical": dict(band=10.0, sink=13.0, column=15.0, topic=0.0, offsets=(0,)),
    "slash": dict(band=16.0, sink=11.0, column=0.0, topic=0.0, offsets=(0, 1357)),
    "topic": dict(band=8.0, sink=11.0, column=0.0, topic=15.0, offsets=(0,)),
    "diffuse": dict(band=4.0, sink=6.0, column=0.0, topic=0.0, offsets=(0,)),
}


def to_bf16(x):
    """Rounds fp32 to bf16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(data.shape),
                        "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    with open(path, "wb") as f:
        f.write(len(blob).to_bytes(8, "little"))
        f.write(blob)
        for data in tensors.values():
            f.write(data.tobytes())


def head_types_of(heads, kv_heads, layer):
    """Returns one type per query head. The members of a KV group differ, and groups rotate with the layer."""
    group = heads // kv_heads
    cycle = ["local", "vertical", "slash", "topic", "local", "vertical", "slash"]
    types = []
    for kv in range(kv_heads):
        types += [cycle[(i + layer) % len(cycle)] for i in range(group)]
    types[(layer * 5) % heads] = "diffuse"
    return types


def rotary_pairs(shape):
    """Returns (fast, topic, column, sink): the pairs that carry distance, and those of the features. The slower a pair,
    the farther its feature is seen: sink and columns from everywhere, topics as far as their pairs hardly turn.
    """
    pairs = shape["head_dim"] // 2
    fast = pairs - TOPIC_DIMS - 2
    return range(fast), range(fast, pairs - 2), pairs - 2, pairs - 1


def layer_tensors(shape, layer, seed):
    rng = np.random.default_rng([seed, layer])
    hidden, d = shape["hidden"], shape["head_dim"]
    heads, kv_heads, half = shape["heads"], shape["kv_heads"], shape["head_dim"] // 2
    fast, topic, column, sink = rotary_pairs(shape)
    frequencies = shape["theta"] ** (-np.arange(half) / half)
    # These fast pairs are worth using: from a full turn in 8 tokens to one in about 30k.
    band = [i for i in fast if frequencies[i] < 0.8 and frequencies[i] > 2e-4]
    scale = math.sqrt(d)

    def noise(*dims, std):
        return rng.standard_normal(dims, dtype=np.float32) * std

    # In a normalised embedding the features have the size that `embedding_tensors` gives them.
    q = noise(heads * d, hidden, std=0.3 * math.sqrt(scale) / math.sqrt(hidden))
    k = noise(kv_heads * d, hidden, std=0.3 * math.sqrt(scale) / math.sqrt(hidden))
    q[:, :FEATURE_DIMS] = 0
    k[:, :FEATURE_DIMS] = 0
    q_const = np.zeros(heads * d, dtype=np.float32)
    k_const = np.zeros(kv_heads * d, dtype=np.float32)
    for kv in range(kv_heads):
        row = kv * d
        for i in band:
            k_const[row + i] = 1.0
        k[row + sink, SINK] = 1.0
        k[row + column, COLUMN] = 1.0
        for t in range(TOPIC_DIMS):
            k[row + topic[t], TOPIC + t] = 1.0
    types = head_types_of(heads, kv_heads, layer)
    for h, kind in enumerate(types):
        row, spec = h * d, HEAD_TYPES[kind]
        jitter = 1.0 + 0.04 * (2 * rng.random(4) - 1)
        for offset in spec["offsets"]:
            amplitude = spec["band"] * jitter[0] * scale / len(band)
            for i in band:
                # The query is turned back by `offset`, so that the peak of q R(distance) k moves to that distance.
                angle = -offset * frequencies[i]
                q_const[row + i] += amplitude * math.cos(angle)
                q_const[row + i + half] += amplitude * math.sin(angle)
        q_const[row + sink] = spec["sink"] * jitter[1] * scale / SPIKE
        q_const[row + column] = spec["column"] * jitter[2] * scale / SPIKE
        for t in range(TOPIC_DIMS):
            q[row + topic[t], TOPIC + t] = spec["topic"] * jitter[3] * scale / TOPIC_SIZE**2
    prefix = f"model.layers.{layer}."
    tensors = {}
    if shape["bias"]:
        tensors[prefix + "self_attn.q_proj.bias"] = to_bf16(q_const)
        tensors[prefix + "self_attn.k_proj.bias"] = to_bf16(k_const)
        tensors[prefix + "self_attn.v_proj.bias"] = to_bf16(np.zeros(kv_heads * d))
    else:
        q[:, ONE] = q_const
        k[:, ONE] = k_const
    small = 0.02  # keeps the residual stream near the embedding
    inter = shape["intermediate"]
    tensors[prefix + "self_attn.q_proj.weight"] = to_bf16(q)
    tensors[prefix + "self_attn.k_proj.weight"] = to_bf16(k)
    for name, dims, fan_in, gain in (
            ("self_attn.v_proj", (kv_heads * d, hidden), hidden, 1.0),
            ("self_attn.o_proj", (hidden, heads * d), heads * d, small),
            ("mlp.gate_proj", (inter, hidden), hidden, 1.0),
            ("mlp.up_proj", (inter, hidden), hidden, 1.0),
            ("mlp.down_proj", (hidden, inter), inter, small)):
        weight = noise(*dims, std=gain / math.sqrt(fan_in))
        if gain == small:
            weight[:FEATURE_DIMS] = 0  # nothing writes over the features
        tensors[prefix + name + ".weight"] = to_bf16(weight)
    ones = to_bf16(np.ones(hidden))
    tensors[prefix + "input_layernorm.weight"] = ones
    tensors[prefix + "post_attention_layernorm.weight"] = ones
    return tensors, types


# These are the sizes of the features in a normalised embedding. The other dimensions are noise of unit size, so that
# the norm is close to sqrt(hidden) and RMSNorm hardly changes the features.
SPIKE = 6.0
TOPIC_SIZE = 3.0


def topics():
    vectors = np.random.default_rng(7).standard_normal((NUM_TOPICS, TOPIC_DIMS), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embedding_tensors(shape, seed):
    rng = np.random.default_rng([seed, 1 << 20])
    vocab, hidden = shape["vocab"], shape["hidden"]
    e = rng.standard_normal((vocab, hidden), dtype=np.float32)
    e[:, :FEATURE_DIMS] = 0
    e[:, ONE] = 1.0
    e[0, SINK] = SPIKE
    e[1:COLUMN_TOKENS, COLUMN] = SPIKE
    ids = np.arange(COLUMN_TOKENS, vocab)
    e[COLUMN_TOKENS:, TOPIC:FEATURE_DIMS] = TOPIC_SIZE * topics()[ids % NUM_TOPICS]
    head = rng.standard_normal((vocab, hidden), dtype=np.float32) / math.sqrt(hidden)
    return {"model.embed_tokens.weight": to_bf16(e), "lm_head.weight": to_bf16(head),
            "model.norm.weight": to_bf16(np.ones(hidden))}


def config_of(shape):
    llama = shape["model_type"] == "llama"
    return {
        "architectures": ["LlamaForCausalLM" if llama else "Qwen2ForCausalLM"],
        "model_type": shape["model_type"], "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"], "vocab_size": shape["vocab"], "hidden_act": "silu",
        "max_position_embeddings": shape["max_positions"], "rms_norm_eps": shape["eps"],
        "rope_theta": shape["theta"], "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": shape["vocab"] - 1,
    } | ({"attention_bias": False} if llama else {"use_sliding_window": False})


def make_prompt(shape, num_tokens, seed):
    """Makes token 0, then segments of one topic each with column tokens sprinkled in."""
    rng = np.random.default_rng([seed, num_tokens])
    ids, per_topic = [], (shape["vocab"] - COLUMN_TOKENS) // NUM_TOPICS - 1
    while len(ids) < num_tokens:
        length, topic = int(rng.integers(128, 1024)), int(rng.integers(NUM_TOPICS))
        first = COLUMN_TOKENS + (topic - COLUMN_TOKENS) % NUM_TOPICS
        ids += (first + NUM_TOPICS * rng.integers(per_topic, size=length)).tolist()
    ids = np.array(ids[:num_tokens])
    columns = rng.integers(0, num_tokens, size=24 + num_tokens // 1024)
    ids[columns] = rng.integers(1, COLUMN_TOKENS, size=len(columns))
    ids[0] = 0
    return ids.tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("output", nargs="?", help="folder of the checkpoint")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", type=int, metavar="N", help="print a prompt of N tokens instead")
    args = parser.parse_args()
    shape = dict(SHAPES[args.shape])
    if args.prompt:
        json.dump(make_prompt(shape, args.prompt, args.seed), sys.stdout)
        return
    if not args.output:
        parser.error("OUTPUT_DIR is missing")
    if args.layers:
        shape["layers"] = args.layers
    os.makedirs(args.output, exist_ok=True)
    weight_map, clusters = {}, {}

    def shard(layer):
        if layer < 0:
            name, tensors, types = "model-embedding.safetensors", embedding_tensors(shape, args.seed), []
        else:
            name = f"model-layer-{layer:03d}.safetensors"
            tensors, types = layer_tensors(shape, layer, args.seed)
        write_safetensors(os.path.join(args.output, name), tensors)
        return name, list(tensors), types

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for layer, (name, names, types) in zip(range(-1, shape["layers"]),
                                               pool.map(shard, range(-1, shape["layers"]))):
            weight_map |= {n: name for n in names}
            for head, kind in enumerate(types):
                clusters.setdefault(kind, []).append([layer, head])
    with open(os.path.join(args.output, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": weight_map}, f)
    with open(os.path.join(args.output, "config.json"), "w") as f:
        json.dump(config_of(shape), f, indent=1)
    with open(os.path.join(args.output, "head_clusters.json"), "w") as f:
        json.dump({"clusters": clusters, "shared_clusters": sorted(clusters)}, f)


if __name__ == "__main__":
    main()
