"""Tests the conversion of a GGUF, on a tiny one made here. Needs numpy, ml_dtypes, gguf, safetensors and tokenizers.

Exits with 77 (skipped, for CTest) without them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import unittest
from pathlib import Path

for needed in ("numpy", "ml_dtypes", "gguf", "safetensors", "tokenizers"):
    if importlib.util.find_spec(needed) is None:
        print(f"skipped: {needed} is not here")
        sys.exit(77)

import get_model  # noqa: E402
import gguf  # noqa: E402
import gguf_checkpoint  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 64, 4, 2, 96, 262
TOKENS = ["<|end|>", "<|start|>"]
MERGES = ["Ġ t", "t h", "Ġt h", "Ġth e"]


def byte_symbols() -> list[str]:
    """Returns the 256 letters of byte-level BPE, in the order of the bytes: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def hugging_face_weights() -> dict[str, np.ndarray]:
    """Makes weights under their names in GGUF, in Hugging Face's order of rows."""
    random = np.random.default_rng(1)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (HIDDEN // 2, HIDDEN), "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN), "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up": (INTERMEDIATE, HIDDEN), "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def in_llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders as llama.cpp's converter does for Llama (LlamaModel.permute)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, weights: dict[str, np.ndarray], **changes) -> None:
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    for key, value in (("context_length", 512), ("embedding_length", HIDDEN), ("block_count", 1),
                       ("feed_forward_length", INTERMEDIATE), ("attention.head_count", HEADS),
                       ("attention.head_count_kv", KV_HEADS)):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_string("tokenizer.ggml.pre", changes.get("pre", "smollm"))
    tokens = TOKENS + byte_symbols() + [merge.replace(" ", "") for merge in MERGES]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [3] * len(TOKENS) + [1] * (len(tokens) - len(TOKENS)))
    writer.add_array("tokenizer.ggml.merges", MERGES)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    for name, weight in weights.items():
        if weight.ndim == 2 and name != "token_embd":
            packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Conversion(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.weights = hugging_face_weights()

    def converted(self, **changes) -> dict[str, np.ndarray]:
        stored = dict(self.weights)
        stored["blk.0.attn_q"] = in_llama_cpp_order(stored["blk.0.attn_q"], HEADS)
        stored["blk.0.attn_k"] = in_llama_cpp_order(stored["blk.0.attn_k"], KV_HEADS)
        write_gguf(self.folder / "tiny.gguf", stored, **changes)
        gguf_checkpoint.convert(self.folder / "tiny.gguf", self.folder / "out")
        return load_file(self.folder / "out" / "model.safetensors")

    def test_every_tensor_is_there_under_its_name_and_close_to_what_it_was(self):
        made = self.converted()
        self.assertEqual(set(made), {gguf_checkpoint.hugging_face_name(f"{name}.weight") for name in self.weights})
        for name, weight in self.weights.items():
            here = made[gguf_checkpoint.hugging_face_name(f"{name}.weight")]
            self.assertEqual((here.shape, here.dtype), (weight.shape, ml_dtypes.bfloat16))
            # Four bits a weight over the range of 32 of them, then bf16.
            coarse = 0.2 if weight.ndim == 2 and name != "token_embd" else 0.01
            self.assertLess(np.abs(here.astype(np.float32) - weight).max(), coarse * np.abs(weight).max(), name)

    def test_rows_of_query_and_key_are_put_back(self):
        made = self.converted()["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)
        for row, weight in zip(made, self.weights["blk.0.attn_q"]):
            self.assertGreater(np.corrcoef(row, weight)[0, 1], 0.98)

    def test_the_configuration_is_that_of_the_file(self):
        self.converted()
        config = json.loads((self.folder / "out" / "config.json").read_text())
        self.assertEqual(
            {k: config[k] for k in ("model_type", "vocab_size", "hidden_size", "head_dim", "num_key_value_heads")},
            {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "head_dim": 16,
             "num_key_value_heads": 2},
        )  # fmt: skip
        self.assertEqual((config["rms_norm_eps"], config["rope_theta"]), (1e-5, 10000.0))
        self.assertTrue(config["tie_word_embeddings"])

    def test_the_tokenizer_merges_splits_digits_and_knows_its_special_tokens(self):
        self.converted()
        tokenizer = Tokenizer.from_file(str(self.folder / "out" / "tokenizer.json"))
        self.assertEqual(tokenizer.encode("a the 12<|end|>").tokens, ["a", "Ġthe", "Ġ", "1", "2", "<|end|>"])
        text = "Grüße, the 3 of them\n"
        self.assertEqual(tokenizer.decode(tokenizer.encode(text).ids), text)

    def test_the_stretched_folder_has_the_same_weights_and_more_positions(self):
        self.converted()
        gguf_checkpoint.stretch(self.folder / "out", self.folder / "long")
        config = json.loads((self.folder / "long" / "config.json").read_text())
        self.assertEqual(config["max_position_embeddings"], 2048)
        self.assertEqual(config["rope_scaling"]["rope_type"], "yarn")
        self.assertEqual(config["rope_scaling"]["original_max_position_embeddings"], 512)
        self.assertTrue(
            (self.folder / "long" / "model.safetensors").samefile(self.folder / "out" / "model.safetensors")
        )

    def test_another_architecture_or_tensor_or_tokenizer_is_refused(self):
        with self.assertRaisesRegex(ValueError, "'gemma'"):
            self.converted(architecture="gemma")
        with self.assertRaisesRegex(ValueError, "'qwen2'"):
            self.converted(pre="qwen2")
        self.weights["blk.0.attn_q_norm"] = np.ones(16, np.float32)
        with self.assertRaisesRegex(ValueError, "blk.0.attn_q_norm.weight"):
            self.converted()

    def test_folders_appear_only_when_they_are_whole(self):
        write_gguf(self.folder / "bad.gguf", {**self.weights, "blk.0.strange": np.ones(4, np.float32)})
        models = get_model.in_cache(self.folder / "cache")
        with self.assertRaisesRegex(ValueError, "strange"):
            get_model.convert_into(self.folder / "bad.gguf", models, self.folder / "work")
        self.assertFalse(models.plain.exists() or models.stretched.exists())
        self.converted()
        get_model.convert_into(self.folder / "tiny.gguf", models, self.folder / "work")
        self.assertEqual({p.name for p in models.plain.iterdir()}, {p.name for p in models.stretched.iterdir()})


if __name__ == "__main__":
    unittest.main()
