"""Turns a Llama model in GGUF into a Hugging Face folder. Needs numpy, ml_dtypes, gguf and safetensors; the
tokenizer also tokenizers.

Quantised tensors are expanded and rounded to bf16, so the folder holds the model as GGUF has it, not as it was before
it was quantised.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file

WHOLE_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type
STRETCH = 4  # factor of YaRN in the stretched folder


def convert(gguf: Path, folder: Path, tokenizer: bool = True) -> None:
    """Writes config.json, model.safetensors and, when asked to, tokenizer.json. Raises ValueError when the file is no
    Llama model that this can express.
    """
    reader = GGUFReader(gguf)
    if (architecture := _value(reader, "general.architecture")) != "llama":
        raise ValueError(f"{gguf.name}: architecture {architecture!r}; only 'llama' is converted")
    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads = (_value(reader, f"llama.attention.{name}") for name in ("head_count", "head_count_kv"))
    tensors = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])  # GGUF counts from the inner axis
        if name.endswith("q_proj.weight"):
            values = halves_from_pairs(values, heads)
        elif name.endswith("k_proj.weight"):
            values = halves_from_pairs(values, kv_heads)
        tensors[name] = np.ascontiguousarray(values)
    _write_json(folder / "config.json", _config(reader, tensors))
    in_bf16 = {name: values.astype(ml_dtypes.bfloat16) for name, values in tensors.items()}
    save_file(in_bf16, folder / "model.safetensors", {"format": "pt"})
    if tokenizer:
        _write_tokenizer(reader, folder / "tokenizer.json")


def stretch(folder: Path, stretched: Path) -> None:
    """Makes a second folder for prompts of up to four times the positions: the same weights, RoPE stretched by YaRN."""
    config = json.loads((folder / "config.json").read_text())
    positions = config["max_position_embeddings"]
    config["max_position_embeddings"] = STRETCH * positions
    config["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": float(STRETCH),
        "original_max_position_embeddings": positions,
    }
    stretched.mkdir(parents=True, exist_ok=True)
    _write_json(stretched / "config.json", config)
    for path in (folder / "model.safetensors", folder / "tokenizer.json"):
        link = stretched / path.name
        link.unlink(missing_ok=True)
        if path.exists():
            link.hardlink_to(path)


def hugging_face_name(name: str) -> str:
    """Turns blk.3.attn_q.weight into model.layers.3.self_attn.q_proj.weight."""
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in WHOLE_MODEL:
        return f"{WHOLE_MODEL[stem]}.weight"
    parts = stem.split(".")
    if kind == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in OF_A_LAYER:
        return f"model.layers.{int(parts[1])}.{OF_A_LAYER[parts[2]]}.weight"
    raise ValueError(f"tensor {name!r} has no place in a Llama checkpoint")


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts rows of q_proj or k_proj in Hugging Face's order. weight: [heads * head_dim, hidden].

    llama.cpp rotates neighbouring pairs and so interleaves the two halves of each head; Hugging Face rotates the halves
    against each other.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _value(reader: GGUFReader, key: str):
    field = reader.fields.get(key)
    if field is None:
        raise ValueError(f"GGUF key {key!r} is missing")
    return field.contents()


def _config(reader: GGUFReader, tensors: dict[str, np.ndarray]) -> dict:
    hidden = _value(reader, "llama.embedding_length")
    heads = _value(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": hidden,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": _value(reader, "llama.context_length"),
        # GGUF holds it as fp32; the shortest decimal that means the same is what the model's author wrote.
        "rms_norm_eps": float(str(np.float32(_value(reader, "llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(_value(reader, "llama.rope.freq_base")),
        "rope_scaling": None,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
    }


def _write_tokenizer(reader: GGUFReader, path: Path) -> None:
    """Rebuilds the byte-level BPE tokenizer, which splits digits first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (split := _value(reader, "tokenizer.ggml.pre")) != "smollm":
        raise ValueError(f"tokenizer.ggml.pre {split!r}; only 'smollm' is known here")
    tokens, kinds = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    made.save(str(path))


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
