"""Small decoders in PyTorch, with attention a parameter: exactly Qwen3ForCausalLM (the embedded model), Qwen2ForCausalLM,
or LlamaForCausalLM with RoPE as it is or stretched by YaRN.

Training passes flash attention, the reference policies pass their block-sparse attention, calibration looks at the maps.
Weights of one kind are stacked over the layers, [num_layers, ...]: the optimizer then updates a kind in one go.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# attend(layer, q [B,H,T,d], k [B,Hkv,T,d], v [B,Hkv,T,d]) -> [B,H,T,d]; q and k are rotated
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


# Older ones, such as Debian 12's, have no attention in which query heads share KV heads.
HAS_GROUPED_ATTENTION = torch.__version__ >= "2.5"


def dense_causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if HAS_GROUPED_ATTENTION:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1).to(v.dtype) @ v


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [N,H,d] by cos and sin [N,d/2]. The halves are rotated against each other, as in Hugging Face."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


# A layer's tensors by our names, which are stacked over the layers, and by their names inside a Hugging Face layer.
LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
}
ARCHITECTURE_TENSORS = {
    "Qwen3ForCausalLM": {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"},
    "Qwen2ForCausalLM": {"bq": "self_attn.q_proj.bias", "bk": "self_attn.k_proj.bias", "bv": "self_attn.v_proj.bias"},
    "LlamaForCausalLM": {},
}
# YaRN leaves the rotary pairs that turn more often than this over the original positions as they are, and slows those
# that turn less often by the whole factor.
YARN_FAST_TURNS, YARN_SLOW_TURNS = 32, 1


def yarn(frequencies: Tensor, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """Returns the frequencies [d/2] stretched as rope_scaling says, and the factor of cos and sin. As in transformers."""
    factor, original, half = scaling["factor"], scaling["original_max_position_embeddings"], len(frequencies)

    def pair_of(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = max(math.floor(pair_of(YARN_FAST_TURNS)), 0), min(math.ceil(pair_of(YARN_SLOW_TURNS)), 2 * half - 1)
    slowed = ((torch.arange(half, device=frequencies.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / factor), 0.1 * math.log(factor) + 1


# One layer's tensors by our names.
Layer = dict[str, Tensor]


def project(h: Tensor, layer: Layer, name: str, head_dim: int) -> Tensor:
    """Projects h [N,D] to [N,heads,d]."""
    bias = layer["b" + name].to(h.dtype) if "b" + name in layer else None
    return F.linear(h, layer["w" + name].to(h.dtype), bias).unflatten(-1, (-1, head_dim))


def before_attention(x: Tensor, layer: Layer, cos: Tensor, sin: Tensor, head_dim: int, eps: float):
    """Computes q [N,H,d] and k, v [N,Hkv,d] from x [N,D]: norm, projections, q/k norm if the model has one, rotation.
    """
    h = rms_norm(x, layer["attention_norm"], eps)
    q, k, v = (project(h, layer, name, head_dim) for name in "qkv")
    if "q_norm" in layer:
        q, k = rms_norm(q, layer["q_norm"], eps), rms_norm(k, layer["k_norm"], eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(x: Tensor, attended: Tensor, layer: Layer, eps: float) -> Tensor:
    """Computes x of the next layer from x [N,D] and attended [N,H*d]: output projection, then the gated MLP."""
    x = x + F.linear(attended, layer["wo"].to(x.dtype))
    h = rms_norm(x, layer["mlp_norm"], eps)
    h = F.silu(F.linear(h, layer["w_gate"].to(h.dtype))) * F.linear(h, layer["w_up"].to(h.dtype))
    return x + F.linear(h, layer["w_down"].to(h.dtype))


class Decoder(nn.Module):
    def __init__(self, config: dict, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.config = config
        self.dtype = dtype  # of activations; parameters stay fp32
        (architecture,) = config["architectures"]
        if architecture not in ARCHITECTURE_TENSORS:
            raise ValueError(f"architecture {architecture!r} unknown; one of {', '.join(ARCHITECTURE_TENSORS)}")
        if not config["tie_word_embeddings"]:
            raise ValueError("tie_word_embeddings false; only models whose output is the embedding are built here")
        scaling = config.get("rope_scaling")
        if scaling and scaling["rope_type"] != "yarn":
            raise ValueError(f"rope_type {scaling['rope_type']!r} unknown; only yarn is built here")
        self.layer_tensors = {**LAYER_TENSORS, **ARCHITECTURE_TENSORS[architecture]}
        layers, width, mlp = (config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        self.head_dim = config["head_dim"]
        self.num_heads, self.num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.eps = config["rms_norm_eps"]
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

        def normal(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(layers, rows, columns) * columns**-0.5)

        def gain(size: int, value: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.full((layers, size), value))

        # A larger embedding would predict the token itself before training starts, because it is tied.
        self.embedding = nn.Parameter(torch.randn(config["vocab_size"], width) * 0.1)
        self.attention_norm, self.mlp_norm = gain(width), gain(width)
        self.wq, self.wk, self.wv = normal(q_width, width), normal(kv_width, width), normal(kv_width, width)
        self.wo = nn.Parameter(torch.zeros(layers, width, q_width))
        if "q_norm" in self.layer_tensors:
            # Unit vectors times gains bound the logits by sqrt(d) * gain^2. 1.5 gives 18, which is sharp enough over
            # 32k keys.
            self.q_norm, self.k_norm = gain(self.head_dim, 1.5), gain(self.head_dim, 1.5)
        elif "bq" in self.layer_tensors:
            self.bq, self.bk, self.bv = gain(q_width, 0.0), gain(kv_width, 0.0), gain(kv_width, 0.0)
        self.w_gate, self.w_up = normal(mlp, width), normal(mlp, width)
        self.w_down = nn.Parameter(torch.zeros(layers, width, mlp))
        self.final_norm = nn.Parameter(torch.full((width,), 0.3))
        # Training replaces these by compiled versions.
        self.before_attention, self.after_attention = before_attention, after_attention

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin, [len(positions), d/2], in fp32."""
        half = self.head_dim // 2
        exponents = torch.arange(half, device=positions.device, dtype=torch.float64) / half
        theta, scaling = self.config["rope_theta"], self.config.get("rope_scaling")
        frequencies, scale = theta**-exponents, 1.0
        if scaling:
            frequencies, scale = yarn(frequencies, theta, scaling)
        angles = positions.double()[:, None] * frequencies
        return (angles.cos() * scale).float(), (angles.sin() * scale).float()

    def forward(self, tokens: Tensor, attend: Attend = dense_causal, first_position: int = 0) -> Tensor:
        """Computes normed hidden states [B,T,D] from tokens [B,T]."""
        batch, length = tokens.shape
        positions = torch.arange(first_position, first_position + length, device=tokens.device)
        cos, sin = (t.repeat(batch, 1) for t in self.rotation(positions))
        return self.run(tokens, attend, cos, sin)

    def run(self, tokens: Tensor, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = F.embedding(tokens.flatten(), self.embedding).to(self.dtype)
        stacks = [getattr(self, name).unbind(0) for name in self.layer_tensors]
        for index, tensors in enumerate(zip(*stacks)):
            layer = dict(zip(self.layer_tensors, tensors))
            qkv = self.before_attention(x, layer, cos, sin, self.head_dim, self.eps)
            q, k, v = (t.view(batch, length, -1, self.head_dim).transpose(1, 2) for t in qkv)
            attended = attend(index, q, k, v).transpose(1, 2).reshape(batch * length, -1)
            x = self.after_attention(x, attended, layer, self.eps)
        return rms_norm(x, self.final_norm, self.eps).view(batch, length, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.to(hidden.dtype)).float()

    @torch.no_grad()
    def bound_logits(self, limit: float = 2.0) -> None:
        """Training without q/k norm: a head's query or key projection never exceeds `limit` times its initial size.

        Nothing else bounds q·k then, and a few large steps would freeze a head on one key. Hidden states are normed, so
        this is a bound: twice the initial size allows logits of some 45 for a key like the query, enough to be sharp.
        """
        if "q_norm" in self.layer_tensors:
            return
        for stack in (self.wq, self.wk):
            heads = stack.unflatten(1, (-1, self.head_dim))  # [layers, heads, d, D]
            size = heads.norm(dim=(-2, -1), keepdim=True)  # sqrt(d) at first
            heads.mul_((limit * self.head_dim**0.5 / size).clamp_max(1))

    # --- Hugging Face folders ---

    def export(self, folder: Path, num_shards: int = 2) -> None:
        """Writes bf16 safetensors shards and their index. The caller writes config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        layers = self.config["num_hidden_layers"]
        named = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final_norm}
        for layer in range(layers):
            for ours, theirs in self.layer_tensors.items():
                named[f"model.layers.{layer}.{theirs}"] = getattr(self, ours)[layer]
        shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
        for key, value in named.items():
            layer = int(key.split(".")[2]) if ".layers." in key else (0 if "embed" in key else layers - 1)
            shards[layer * num_shards // layers][key] = value.detach().to("cpu", torch.bfloat16).contiguous()
        index: dict = {"metadata": {"total_size": sum(2 * t.numel() for s in shards for t in s.values())}}
        index["weight_map"] = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index["weight_map"].update({key: file for key in shard})
        index["weight_map"] = dict(sorted(index["weight_map"].items()))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    @staticmethod
    def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> "Decoder":
        """Loads a folder of these architectures, for inference until gradients are switched on."""
        model = Decoder(json.loads((folder / "config.json").read_text()), dtype)
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(file))
        with torch.no_grad():
            model.embedding.copy_(tensors["model.embed_tokens.weight"])
            model.final_norm.copy_(tensors["model.norm.weight"])
            for layer in range(model.config["num_hidden_layers"]):
                for ours, theirs in model.layer_tensors.items():
                    getattr(model, ours)[layer].copy_(tensors[f"model.layers.{layer}.{theirs}"])
        return model.to(device).requires_grad_(False).eval()
