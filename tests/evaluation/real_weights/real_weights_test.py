"""Serves SmolLM2-135M and compares it with what Hugging Face transformers computed, and sparse attention with dense.

    python3 tests/evaluation/real_weights/real_weights_test.py build/release/bin FOLDER

FOLDER keeps the model, which is downloaded into it once (93 MB). Exits with 77 (skipped, for CTest) without the
packages of the Python client, gguf, ml_dtypes and safetensors.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import unittest
from pathlib import Path

for needed in ("numpy", "grpc", "google.protobuf", "xxhash", "gguf", "ml_dtypes", "safetensors"):
    if importlib.util.find_spec(needed) is None:
        print(f"skipped: {needed} is not here")
        sys.exit(77)

import get_model  # noqa: E402
import measure  # noqa: E402  it makes the client importable
import numpy as np  # noqa: E402
import settings  # noqa: E402
import texts  # noqa: E402
from live_processes import Programs  # noqa: E402
from prefilld import DecodeClient, PrefillClient  # noqa: E402

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
TIMEOUT = 300  # seconds for one prompt, on a machine that does other things too
BIN_DIR, CACHE = (Path(argument) for argument in (sys.argv[1:3] if len(sys.argv) > 2 else (".", ".")))
GENERATED = 8  # tokens; each is a pass of the reference worker
WORSE = 1.01  # perplexity of a sparse policy beside dense, at most
MOST_LOST = 0.03  # nats a token, of tokens that end a repeat and of all others, at the thresholds of a server


class RealWeights(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        model = get_model.obtain(CACHE, tokenizer=False).plain
        programs = cls.enterClassContext(Programs())
        server = programs.start(BIN_DIR / "prefilld", model, "--device=cpu", "--metrics_listen=")
        worker = programs.start(
            BIN_DIR / "prefilld-decode-worker", model, f"--prefill_address={server}", "--kv_pool_tokens=4096"
        )
        cls.client = cls.enterClassContext(PrefillClient(server))
        cls.worker = cls.enterClassContext(DecodeClient(worker))
        cls.dense = cls.logprobs("dense")

    @classmethod
    def logprobs(cls, setting: str, ids: list[int] = GOLDEN["ids"]) -> np.ndarray:
        cls.result = measure.ask(cls.client, ids, settings.parse(setting)[0], TIMEOUT)
        return np.array(cls.result.prompt_logprobs)

    def test_dense_log_probabilities_are_those_of_transformers(self):
        # Both compute in fp32 here, so they differ by the order of sums alone.
        self.assertAlmostEqual(-self.dense.mean(), GOLDEN["nats_per_token"], delta=0.0001)
        self.assertLess(np.abs(self.dense - GOLDEN["logprobs"]).max(), 0.002)

    def test_greedy_tokens_are_those_of_transformers(self):
        with self.worker.generate(
            GOLDEN["ids"], GENERATED, attention=measure.Attention("dense"), ignore_eos=True, timeout=TIMEOUT
        ) as stream:
            self.assertEqual([token.id for token in stream], GOLDEN["greedy"][:GENERATED])

    def test_sparse_policies_keep_the_perplexity(self):
        for policy in ("share", "vertical_slash"):
            worse = math.exp(self.dense.mean() - self.logprobs(policy).mean())
            self.assertLess(worse, WORSE, policy)
            self.assertLess(self.result.total.density, 0.9, policy)

    def test_it_does_not_without_the_scores(self):
        last_rows = "share:last_rows_gamma=0.3,min_budget_tokens=0"
        worse = lambda setting: math.exp(self.dense.mean() - self.logprobs(setting).mean())  # noqa: E731
        self.assertLess(worse(f"{last_rows},score_threshold=0.9"), WORSE)
        self.assertGreater(worse(f"{last_rows},score_threshold=0.001"), 2 * WORSE - 1)

    def test_neither_what_repeats_earlier_text_nor_the_rest_loses_much(self):
        # A passage returns, and then the text goes on: its last rows have no reason to look at where it was before.
        ids = [*GOLDEN["ids"][:768], *GOLDEN["ids"][:768], *GOLDEN["ids"][768:1280]]
        dense = texts.nats_by_sort(ids, -self.logprobs("dense", ids))

        def lost(setting: str) -> dict[str, float]:
            nats = texts.nats_by_sort(ids, -self.logprobs(setting, ids))
            sorts = ("repeated", "other")
            return {sort: (nats[f"nats_{sort}"] - dense[f"nats_{sort}"]) / dense[f"tokens_{sort}"] for sort in sorts}

        self.assertGreater(dense["tokens_repeated"], 700)
        for sort, nats in lost("share").items():
            self.assertLess(nats, MOST_LOST, sort)
        self.assertGreater(lost("vertical_slash:gamma=0.9")["repeated"], MOST_LOST)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
