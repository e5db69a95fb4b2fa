"""Tests what prefilld.transformers puts into a cache, with a server of this build and stand-ins for transformers' classes.

    python3 tests/python/transformers_adapter_test.py build/release/bin

tests/engines/transformers_test.py has the real ones. Exits with 77 (skipped, for CTest) without torch or the client's
packages.
"""

import sys
import types
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

try:
    import numpy as np
    import torch
    from prefilld import Attention, Layout, PrefillClient, to_float32
    from prefilld.transformers import prefill_cache
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

TEXT = list((ROOT / "client" / "README.md").read_bytes())


class DynamicCache:
    def __init__(self):
        self.layers = []

    def update(self, keys, values, layer):
        assert layer == len(self.layers)
        self.layers.append((keys, values))


class Model:
    """A model of the shape of model/tiny. One layer has its parameters elsewhere."""

    def __init__(self, dtype=torch.float32, rope_dtype=torch.float32, **config):
        made = dict(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=64, hidden_size=320)
        self.config = types.SimpleNamespace(**{**made, **config})
        self.config.get_text_config = lambda: self.config
        self.dtype = dtype
        places = ["meta" if layer == 5 and config.get("spread") else "cpu" for layer in range(8)]
        layers = [types.SimpleNamespace(parameters=lambda p=p: iter([torch.empty(1, device=p)])) for p in places]
        buffers = [("rotary_emb.inv_freq", torch.ones(32, dtype=rope_dtype))]
        self.get_decoder = lambda: types.SimpleNamespace(layers=layers, named_buffers=lambda: iter(buffers))


class Adapter(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        sys.modules["transformers"] = types.SimpleNamespace(DynamicCache=DynamicCache)
        cls.addClassCleanup(sys.modules.pop, "transformers")
        programs = cls.enterClassContext(live_processes.Programs())
        cls.server = programs.start(BIN_DIR / "prefilld", live_processes.MODEL, "--metrics_listen=")
        cls.client = cls.enterClassContext(PrefillClient(cls.server))

    def fill(self, model, *inputs, **options):
        return prefill_cache(self.client, model, *inputs, attention=Attention("dense"), **options).layers

    def expected(self, tokens, dtype="fp32"):
        """Returns [layers, 2, heads, tokens - 1, head_dim]."""
        layout = Layout(block_tokens=16, order="nhd", dtype=dtype)
        with self.client.prefill(tokens, layout=layout, attention=Attention("dense")) as stream:
            cache = to_float32(stream.read_all())
        return cache.reshape(8, 2, -1, 2, 64)[:, :, : len(tokens) - 1].swapaxes(2, 3)

    def test_a_cache_holds_all_tokens_but_the_last(self):
        for length in (2, 128, 129, 130, 700):
            layers = self.fill(Model(), torch.tensor([TEXT[:length]]))
            found = np.stack([[k[0].numpy(), v[0].numpy()] for k, v in layers])
            np.testing.assert_array_equal(found, self.expected(TEXT[:length]))

    def test_shorter_prompts_of_a_batch_are_padded_on_the_left(self):
        lengths, width = (150, 129, 5), 150
        ids, mask = torch.zeros((3, width), dtype=torch.long), torch.zeros((3, width), dtype=torch.long)
        for row, length in enumerate(lengths):
            ids[row, width - length :] = torch.tensor(TEXT[row : row + length])
            mask[row, width - length :] = 1
        layers = self.fill(Model(), ids, mask)
        found = np.stack([[k.numpy(), v.numpy()] for k, v in layers])
        for row, length in enumerate(lengths):
            expected = self.expected(TEXT[row : row + length])
            np.testing.assert_array_equal(found[:, :, row, :, width - length :], expected)
            self.assertFalse(found[:, :, row, :, : width - length].any())

    def test_layers_have_the_models_dtype_and_their_own_device(self):
        layers = self.fill(Model(torch.bfloat16, spread=True), torch.tensor([TEXT[:40]]))
        self.assertEqual([k.device.type for k, _ in layers], ["cpu"] * 5 + ["meta"] + ["cpu"] * 2)
        self.assertEqual({k.dtype for k, _ in layers}, {torch.bfloat16})
        np.testing.assert_array_equal(layers[3][1][0].float().numpy(), self.expected(TEXT[:40], "bf16")[3, 1])

    def test_a_cache_may_come_in_fp8(self):
        exact = self.expected(TEXT[:300])
        for scales in ("per_token", "per_block"):
            layout = Layout(block_tokens=64, dtype="fp8_e4m3", scales=scales)
            layers = self.fill(Model(), torch.tensor([TEXT[:300]]), layout=layout)
            found = np.stack([[k[0].numpy(), v[0].numpy()] for k, v in layers])
            error, largest = np.abs(found - exact), np.abs(exact).max()
            self.assertTrue(error.any())
            # Half a step of the largest numbers, or of the smallest of a scale.
            self.assertTrue((error <= np.maximum(np.abs(exact) * 2.0**-4, largest / 448 * 2.0**-10) * 1.00001).all())

    def test_a_layout_that_cannot_be_filled_is_refused(self):
        for layout in (Layout(order="hnd"), Layout(first_head=1), Layout(num_heads=1), Layout(first_block=1)):
            with self.assertRaisesRegex(ValueError, "order nhd with all heads"):
                self.fill(Model(), torch.tensor([TEXT[:40]]), layout=layout)

    def test_a_model_that_cannot_be_filled_is_refused(self):
        for text, model in (
            ("8 layers, this one 9", Model(num_hidden_layers=9)),
            ("2 KV heads, this one 4", Model(num_key_value_heads=4)),
            ("64 elements in a head, this one 128", Model(head_dim=128)),
            ("sliding_attention", Model(layer_types=["full_attention", "sliding_attention"])),
            ("float64", Model(torch.float64)),
            ("RoPE frequencies are torch.bfloat16", Model(torch.bfloat16, torch.bfloat16)),
        ):
            with self.assertRaisesRegex(ValueError, text):
                self.fill(model, torch.tensor([TEXT[:40]]))


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
