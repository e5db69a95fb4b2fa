"""Tests that generate() of Hugging Face transformers goes on from prefilld's KV as from its own, token for token.

    python3 tests/engines/transformers_test.py build/release/bin [--real=FOLDER]

FOLDER has SmolLM2-135M-Instruct (tests/evaluation/real_weights/get_model.py), which is left out without it. Exits with 77 (skipped, for CTest) without torch, transformers, or the client's packages.
"""

import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402

try:
    import torch
    import transformers
    from prefilld import Attention, Layout, PrefillClient, PrefilldError
    from prefilld.transformers import prefill_cache
    from prompts_of_engines import prompts
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

TEXT = (ROOT / "client" / "README.md").read_bytes() + (ROOT / "tests" / "README.md").read_bytes()
LENGTHS = (2, 17, 128, 129, 257, 1000, 2500)
SMALL = dict(
    vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
RANDOM = {  # three families, with heads of 64 elements
    "llama": lambda: transformers.LlamaConfig(**SMALL, head_dim=64),
    "qwen2": lambda: transformers.Qwen2Config(**{**SMALL, "hidden_size": 256, "tie_word_embeddings": True}),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=64),
}


def prompt(length, first=0):
    return torch.tensor([list(TEXT[first : first + length])])


class Generation(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        torch.manual_seed(0)
        cls.programs = cls.enterClassContext(live_processes.Programs())
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="prefilld-transformers-")))

    def serve(self, folder, device="cpu"):
        """Starts a server; on the CPU it computes in fp32, as the models that are compared with it."""
        flags = ("--metrics_listen=", f"--device={device}")
        return self.enterContext(PrefillClient(self.programs.start(BIN_DIR / "prefilld", folder, *flags)))

    def tiny(self, dtype=torch.float32):
        return transformers.AutoModelForCausalLM.from_pretrained(live_processes.MODEL, dtype=dtype)

    def generate(self, model, cache=None, new_tokens=16, **inputs):
        made = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return made.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(made.logits)

    def compare(self, model, client, asked):
        for ids in asked:
            length = ids.shape[1]
            own, own_logits = self.generate(model, input_ids=ids)
            cache = prefill_cache(client, model, ids, attention=Attention("dense"))
            self.assertEqual(cache.get_seq_length(), length - 1)
            filled, logits = self.generate(model, cache, input_ids=ids)
            farthest = (logits - own_logits).abs().max().item()
            print(f"{length} tokens: logits at most {farthest:.2g} apart, of {own_logits.abs().max():.3g}", file=sys.stderr)
            self.assertEqual(filled, own, f"{length} tokens")
            torch.testing.assert_close(logits, own_logits, rtol=1e-3, atol=1e-3)

    def test_the_embedded_model(self):
        model = self.tiny()
        client = self.serve(live_processes.MODEL)
        self.compare(model, client, map(prompt, LENGTHS))
        with self.subTest("prompts of different lengths, padded on the left"):
            lengths = (300, 129, 7)
            ids, mask = torch.zeros((3, 300), dtype=torch.long), torch.zeros((3, 300), dtype=torch.long)
            for row, length in enumerate(lengths):
                ids[row, 300 - length :] = prompt(length, first=row)
                mask[row, 300 - length :] = 1
            own, _ = self.generate(model, input_ids=ids, attention_mask=mask)
            cache = prefill_cache(client, model, ids, mask, attention=Attention("dense"), lanes=2)
            self.assertEqual(self.generate(model, cache, input_ids=ids, attention_mask=mask)[0], own)
        with self.subTest("a cache of another prompt leads elsewhere"):
            cache = prefill_cache(client, model, prompt(300, first=900), attention=Attention("dense"))
            own, own_logits = self.generate(model, input_ids=prompt(300))
            _, logits = self.generate(model, cache, input_ids=prompt(300))
            self.assertGreater((logits - own_logits).abs().max(), 0.1)
        with self.subTest("refusals"):
            with self.assertRaisesRegex(PrefilldError, "INVALID_ARGUMENT"):
                prefill_cache(client, model, torch.tensor([[1, 999_999]]))
            for ids, mask in ((prompt(1), None), (prompt(4)[0], None), (prompt(4), torch.tensor([[1, 1, 0, 0]]))):
                with self.assertRaises(ValueError):
                    prefill_cache(client, model, ids, mask)
            with self.assertRaises(TypeError):
                prefill_cache(client, model, prompt(4), layout=Layout())
            with self.assertRaisesRegex(ValueError, "RoPE frequencies are torch.bfloat16"):
                prefill_cache(client, self.tiny().to(torch.bfloat16), prompt(4))
            other = transformers.LlamaForCausalLM(RANDOM["llama"]())
            with self.assertRaisesRegex(ValueError, "server's model has 8 layers, this one 3"):
                prefill_cache(client, other, prompt(4))

    def test_random_models_of_three_families(self):
        for name, config in RANDOM.items():
            with self.subTest(name):
                model = transformers.AutoModelForCausalLM.from_config(config()).eval()
                with torch.no_grad():
                    for parameter in model.parameters():  # larger than at the start of training: attention matters
                        parameter.mul_(3 if parameter.dim() > 1 else 1)
                model.save_pretrained(self.folder / name)
                self.compare(model, self.serve(self.folder / name), map(prompt, (17, 257, 1500)))

    def test_real_weights(self):
        if REAL is None:
            self.skipTest("no folder of SmolLM2-135M-Instruct")
        model = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
        asked = [torch.tensor([tokens]) for tokens in prompts(REAL).values()]
        self.compare(model, self.serve(REAL), asked)

    @unittest.skipUnless(torch.cuda.is_available(), "no GPU")
    def test_a_model_on_a_gpu(self):
        """bf16, KV in GPU memory: logits as close to those of fp32 as after a cache that the model filled itself."""
        client = self.serve(live_processes.MODEL, device="cuda")
        exact = self.tiny()
        model = self.tiny(torch.bfloat16).to("cuda")
        for length in (100, 257, 1000, 2500):
            ids = prompt(length)
            _, best = self.generate(exact, input_ids=ids, new_tokens=1)
            with torch.no_grad():
                own_cache = model(ids[:, :-1].cuda(), use_cache=True).past_key_values
            cache = prefill_cache(client, model, ids.cuda(), attention=Attention("dense"))
            errors = []
            for filled in (cache, own_cache):
                self.assertTrue(all(layer.keys.is_cuda for layer in filled.layers))
                _, logits = self.generate(model, filled, input_ids=ids.cuda(), new_tokens=1)
                errors.append((logits.float().cpu() - best).norm().item())
            print(f"{length} tokens: logits lie {errors[0]:.3f} from fp32, {errors[1]:.3f} after the model's own cache")
            self.assertLess(errors[0], 2 * errors[1] + 0.2)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    REAL = Path(sys.argv.pop(1).partition("=")[2]) if sys.argv[1:] and sys.argv[1].startswith("--real=") else None
    unittest.main()
