"""Tests the trainer's decoder, in both shapes and as Llama. Needs PyTorch and safetensors; exits with 77 (skipped, for CTest)
without them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
import unittest
from pathlib import Path

if not all(importlib.util.find_spec(name) for name in ("torch", "safetensors")):
    sys.exit(77)

TINY = Path(__file__).parents[2] / "model" / "tiny"
sys.path.insert(0, str(TINY))

import torch  # noqa: E402
from decoder import Decoder, dense_causal, yarn  # noqa: E402

CONFIGS = {name: json.loads((TINY / f"{name}.json").read_text()) for name in ("config", "second_shape")}
CONFIGS["llama"] = {**CONFIGS["second_shape"], "architectures": ["LlamaForCausalLM"]}


def made(name: str) -> Decoder:
    """Makes a decoder whose every tensor differs from where training starts it."""
    torch.manual_seed(1)
    model = Decoder({**CONFIGS[name], "num_hidden_layers": 2}, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return model.requires_grad_(False)


def logits(model: Decoder) -> torch.Tensor:
    return model.logits(model(torch.arange(40)[None]))


class TinyDecoder(unittest.TestCase):
    def test_what_is_exported_loads_again(self):
        for name in CONFIGS:
            model = made(name)
            with tempfile.TemporaryDirectory() as folder:
                model.export(Path(folder))
                (Path(folder) / "config.json").write_text(json.dumps(model.config))
                again = Decoder.load(Path(folder), dtype=torch.float32)
            torch.testing.assert_close(logits(again), logits(model), msg=name)

    def test_every_tensor_matters(self):
        for name in CONFIGS:
            model = made(name)
            before = logits(model)
            for tensor in model.layer_tensors:
                stack = getattr(model, tensor)
                kept = stack[0].clone()
                stack[0] += 0.1 * torch.randn_like(kept)
                self.assertGreater((logits(model) - before).abs().max().item(), 1e-4, f"{name} {tensor}")
                stack[0] = kept

    def test_query_heads_share_kv_heads_in_groups(self):
        q, k, v = (torch.randn(2, heads, 12, 64) for heads in (6, 2, 2))
        attended = dense_causal(0, q, k, v)
        for head in range(6):
            alone = dense_causal(0, *(x[:, i : i + 1] for x, i in ((q, head), (k, head // 3), (v, head // 3))))
            torch.testing.assert_close(attended[:, head : head + 1], alone)

    def test_no_position_sees_later_ones(self):
        for name in CONFIGS:
            model, ids = made(name), torch.arange(40)[None]
            torch.testing.assert_close(model(ids)[:, :20], model(ids[:, :20]), msg=name)

    def test_projections_stay_bounded_where_no_norm_bounds_the_logits(self):
        model = made("second_shape")
        values = model.wv.clone()
        model.wq *= 100
        model.wk[:, 128:] *= 100  # one head of two
        small = model.wk[:, :128].clone()
        model.bound_logits(limit=2)
        sizes = model.wq.unflatten(1, (-1, 128)).norm(dim=(-2, -1))
        torch.testing.assert_close(sizes, torch.full_like(sizes, 2 * 128**0.5), rtol=1e-4, atol=0)
        torch.testing.assert_close(model.wk[:, :128], small)
        torch.testing.assert_close(model.wv, values)

    def test_a_norm_needs_no_bound(self):
        model = made("config")
        model.wq *= 100
        before = model.wq.clone()
        model.bound_logits()
        torch.testing.assert_close(model.wq, before)

    def test_yarn_slows_what_hardly_turns_and_leaves_what_turns_often(self):
        frequencies = 100000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
        slowed, scale = yarn(frequencies, 100000.0, {"factor": 4.0, "original_max_position_embeddings": 8192})
        turns = 8192 * frequencies / (2 * math.pi)
        ratio = slowed / frequencies
        torch.testing.assert_close(ratio[turns > 64], torch.ones_like(ratio[turns > 64]))
        torch.testing.assert_close(ratio[turns < 0.7], torch.full_like(ratio[turns < 0.7], 0.25))
        self.assertTrue(bool((ratio.diff() <= 0).all()))
        self.assertAlmostEqual(scale, 0.1 * math.log(4) + 1)

    def test_a_stretched_model_rotates_by_it(self):
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
        plain, stretched = (Decoder({**CONFIGS["llama"], "rope_scaling": s}) for s in (None, scaling))
        (cos, _), (slower, _) = (model.rotation(torch.tensor([4096])) for model in (plain, stretched))
        torch.testing.assert_close(slower[:, 0], cos[:, 0] * (0.1 * math.log(4) + 1))
        self.assertGreater(float((slower - cos)[:, 40:].abs().max()), 0.05)

    def test_what_would_be_computed_wrongly_is_refused(self):
        for name, value in (("tie_word_embeddings", False), ("rope_scaling", {"rope_type": "llama3"})):
            with self.assertRaisesRegex(ValueError, "only"):
                Decoder({**CONFIGS["llama"], name: value})

    def test_other_architectures_are_refused(self):
        with self.assertRaisesRegex(ValueError, "GPT2LMHeadModel"):
            Decoder({**CONFIGS["config"], "architectures": ["GPT2LMHeadModel"]})


if __name__ == "__main__":
    unittest.main()
