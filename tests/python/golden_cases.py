"""The small models that prefilld is compared with Hugging Face transformers on.

Weights are no files: every element is a function of the tensor's name and its index, so that this
script and tests/model/golden.cc make the same ones. They are small integers times a
power of two, hence exact in bf16, fp16 and fp32 alike.
"""

import dataclasses
import math

import numpy as np

LENGTHS = (1, 17, 128, 129, 1000)  # around attention tiles and pages, and past them


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    config: dict  # beyond BASE
    dtype: str = "float32"  # of the checkpoint; the reference computes in float32
    shards: int = 1
    old_rope: bool = False  # config.json as transformers 4 wrote it
    old_kind_key: str = "rope_type"  # or "type"


BASE = dict(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def rope(kind, theta=10000.0, **parameters):
    return dict(rope_type=kind, rope_theta=theta, **parameters)


CASES = (
    Case("llama_mha", "llama", dict(num_key_value_heads=2, rope_parameters=rope("default")),
         old_rope=True),
    Case("llama_gqa_llama3", "llama",
         dict(num_attention_heads=4, num_key_value_heads=2,
              rope_parameters=rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0,
                                   high_freq_factor=4.0, original_max_position_embeddings=256)),
         dtype="bfloat16", shards=3),
    Case("llama_bias_tied_linear", "llama",
         dict(attention_bias=True, tie_word_embeddings=True,
              rope_parameters=rope("linear", factor=4.0)),
         old_rope=True, old_kind_key="type"),
    Case("llama_dynamic_ntk", "llama",
         dict(num_key_value_heads=2, max_position_embeddings=128,
              rope_parameters=rope("dynamic", factor=2.0))),
    Case("llama_mqa_d128", "llama",
         dict(head_dim=128, eos_token_id=[2, 3],
              rope_parameters=rope("llama3", 500000.0, factor=32.0, low_freq_factor=1.0,
                                   high_freq_factor=4.0, original_max_position_embeddings=512)),
         dtype="float16", old_rope=True),
    Case("qwen2_yarn", "qwen2",
         dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=384, rms_norm_eps=1e-6,
              max_position_embeddings=1024,
              rope_parameters=rope("yarn", 1000000.0, factor=4.0,
                                   original_max_position_embeddings=256)),
         dtype="bfloat16", old_rope=True, old_kind_key="type"),
    Case("qwen2_tied", "qwen2",
         dict(tie_word_embeddings=True, rope_parameters=rope("default", 1000000.0)),
         dtype="bfloat16", shards=2),
    Case("qwen3_gqa_d128", "qwen3",
         dict(num_attention_heads=4, num_key_value_heads=2, head_dim=128,
              rope_parameters=rope("default", 1000000.0)),
         dtype="bfloat16"),
    Case("qwen3_tied_yarn_ramp", "qwen3",
         dict(num_attention_heads=4, tie_word_embeddings=True, max_position_embeddings=1024,
              rope_parameters=rope("yarn", 1000000.0, factor=8.0, beta_fast=16.0, beta_slow=2.0,
                                   mscale=1.0, mscale_all_dim=0.5, truncate=False,
                                   original_max_position_embeddings=128))),
    Case("mistral_gqa_d128", "mistral",
         dict(num_attention_heads=4, num_key_value_heads=2, head_dim=128, sliding_window=None,
              rope_parameters=rope("default", 1000000.0)),
         shards=2),
)

# Only the rotation of these configurations is compared. They have the published parameters of real models.
ROPE_ONLY = {
    "llama-2-7b": ("llama", dict(head_dim=128, max_position_embeddings=4096,
                                 rope_parameters=rope("default"))),
    "llama-3.1-8b": ("llama", dict(head_dim=128, max_position_embeddings=131072,
                                   rope_parameters=rope(
                                       "llama3", 500000.0, factor=8.0, low_freq_factor=1.0,
                                       high_freq_factor=4.0,
                                       original_max_position_embeddings=8192))),
    "qwen2.5-7b-yarn": ("qwen2", dict(head_dim=128, max_position_embeddings=131072,
                                      rope_parameters=rope(
                                          "yarn", 1000000.0, factor=4.0,
                                          original_max_position_embeddings=32768))),
    "qwen3-8b": ("qwen3", dict(head_dim=128, max_position_embeddings=40960,
                               rope_parameters=rope("default", 1000000.0))),
    "yarn-attention-factor": ("llama", dict(head_dim=64, max_position_embeddings=65536,
                                            rope_parameters=rope(
                                                "yarn", 10000.0, factor=16.0, attention_factor=1.5,
                                                original_max_position_embeddings=4096))),
    "dynamic-factor-8": ("llama", dict(head_dim=128, max_position_embeddings=4096,
                                       rope_parameters=rope("dynamic", 10000.0, factor=8.0))),
}
ROPE_LENGTHS = (1, 1000, 131072)


def hf_config(model_type, overrides):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **{**BASE, **overrides})
    config.architectures = [
        {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
         "mistral": "MistralForCausalLM"}[model_type]
    ]
    return config


def _mix(x):
    """Computes the finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _stream(name, count):
    """Makes `count` 64-bit numbers that depend on the name (FNV-1a) and the index alone."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) % 2**64
    index = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return _mix(np.uint64(seed) + index * np.uint64(0x9E3779B97F4A7C15))


def tensor_values(name, shape, mean, shift):
    """Makes mean + k / 2^shift, where k is a signed byte."""
    k = (_stream(name, int(np.prod(shape))) >> np.uint64(56)).astype(np.uint8).view(np.int8)
    return (mean + k.astype(np.float32) * np.float32(2.0**-shift)).reshape(shape)


def distribution(name, shape):
    """Returns (mean, shift) of a tensor, such that activations stay near 1 and attention is peaked, but not so much
    that a rounding error to bf16 moves it to another key.
    """
    if "norm" in name:
        return 1.0, 7
    if name.endswith(".bias"):
        return 0.0, 8
    if "embed_tokens" in name:
        return 0.0, 7
    # A byte deviates by 74, and a projection is to multiply the scale of its input by `gain`.
    gain = 1.6 if "q_proj" in name or "lm_head" in name else 0.8
    return 0.0, round(math.log2(74 * math.sqrt(shape[-1]) / gain))


def prompt_tokens(case, count, vocab_size):
    return (_stream(case.name + ".prompt", count) % np.uint64(vocab_size)).astype(np.int64)


def position_signs(count):
    """Returns +1 or -1 per position. A sum with these signs shows when a value moved to another position."""
    return np.where(_stream("signs", count) >> np.uint64(63), -1.0, 1.0)


def sampled_positions(count):
    wanted = {0, 1, 15, 16, 63, 127, 128, 511, count // 2, count - 2, count - 1}
    return sorted(p for p in wanted if 0 <= p < count)
