"""Tests that KV comes into caches as vLLM keeps them on GPUs, beside a loop that writes them token by token.

    python3 tests/engines/vllm_cache_copy_test.py build/release/bin

Where there is a GPU, caches and prefilld are on it; else both are on the CPU. Exits with 77 (skipped, for CTest)
without torch or the client's packages.
"""

import random
import sys
import time
import types
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests" / "evaluation")]
import live_processes  # noqa: E402
import vllm_stand_in  # noqa: E402
from vllm_stand_in import Role  # noqa: E402

try:
    import torch
    from prefilld import Attention, Layout, PrefillClient
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)
if live_processes.reason_to_skip():
    print(f"skipped: {live_processes.reason_to_skip()}")
    sys.exit(77)

vllm_stand_in.install()
from prefilld.vllm import PrefilldConnector  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, HEADS, HEAD_DIM = 8, 2, 64  # of the embedded model
BLOCK = 16  # tokens of a block, as FlashAttention's and FlashInfer's by default
PATIENCE = 60


def empty_cache(order):
    """Returns one layer's cache as vLLM 0.32 shows it, [blocks, heads, tokens, 2 * head_dim], whatever its memory is.

    order: of a block's axes in memory. Every value is -1.
    """
    blocks = 200
    if order == "hn2d":
        return torch.full((blocks, HEADS, BLOCK, 2 * HEAD_DIM), -1.0, dtype=torch.bfloat16, device=DEVICE)
    by_token = torch.full((blocks, BLOCK, HEADS, 2 * HEAD_DIM), -1.0, dtype=torch.bfloat16, device=DEVICE)
    return by_token.transpose(1, 2)


def write_one_by_one(cache, keys, values, slots):
    """Stores [tokens, heads, head_dim] at slots, as FlashAttention's do_kv_cache_update does at once."""
    for i, slot in enumerate(slots):
        cache[slot // BLOCK, :, slot % BLOCK, :HEAD_DIM] = keys[i]
        cache[slot // BLOCK, :, slot % BLOCK, HEAD_DIM:] = values[i]


class Engine:
    """The connector, and caches of one order. written: how many tokens the backend was asked to write."""

    def __init__(self, order, address):
        self.written = 0
        self.caches = {f"model.layers.{i}.self_attn.attn": empty_cache(order) for i in range(LAYERS)}

        def update(layer, keys, values, cache, slots):
            if len(cache) > 1:  # else the connector asks for the order
                self.written += len(slots)
            write_one_by_one(cache, keys, values, slots.tolist())

        impl = types.SimpleNamespace(do_kv_cache_update=update)
        of = types.SimpleNamespace
        extra = {"policy": "dense", "prefill_address": address, "min_prompt_tokens": 1, "retries": 0}
        config = of(
            kv_transfer_config=of(kv_role="kv_consumer", kv_connector_extra_config=extra),
            parallel_config=of(pipeline_parallel_size=1),
            model_config=of(
                dtype=torch.bfloat16, get_total_num_kv_heads=lambda: HEADS, get_head_size=lambda: HEAD_DIM
            ),
            cache_config=of(cache_dtype="auto", block_size=BLOCK),
            compilation_config=of(static_forward_context={name: of(impl=impl) for name in self.caches}),
            speculative_config=None,
        )
        kv_cache_config = of(kv_cache_groups=[None])
        self._scheduler = PrefilldConnector(config, Role.SCHEDULER, kv_cache_config)
        self._worker = PrefilldConnector(config, Role.WORKER, kv_cache_config)
        self._worker.register_kv_caches(self.caches)
        self.close = self._worker.shutdown

    def load(self, name, tokens, blocks, cached):
        """Loads what is not cached. Returns the seconds that it took, and the blocks that it says were not filled."""
        request = types.SimpleNamespace(
            request_id=name, num_prompt_tokens=len(tokens), prompt_token_ids=tokens, kv_transfer_params=None
        )
        count, _ = self._scheduler.get_num_new_matched_tokens(request, cached)
        given = types.SimpleNamespace(get_block_ids=lambda: (blocks,))
        self._scheduler.update_state_after_alloc(request, given, count)
        self._worker.bind_connector_metadata(self._scheduler.build_connector_meta(None))
        begin = time.monotonic()
        self._worker.start_load_kv(None)
        done = set()
        while not done and time.monotonic() < begin + PATIENCE:
            done = self._worker.get_finished(set())[1] or set()
            time.sleep(0.001)
        return time.monotonic() - begin, self._worker.get_block_ids_with_load_errors()


class CacheCopy(unittest.TestCase):
    """Prompts of a part of a block, of whole blocks and of many; from their beginning, or behind what vLLM has."""

    @classmethod
    def setUpClass(cls):
        programs = cls.enterClassContext(live_processes.Programs())
        flags = ("--metrics_listen=", f"--device={DEVICE}")
        cls.server = programs.start(BIN_DIR / "prefilld", live_processes.MODEL, *flags)
        cls.client = cls.enterClassContext(PrefillClient(cls.server))

    def expected(self, order, tokens, blocks, cached, fills_blocks):
        """Returns the caches as a plain loop fills them."""
        layers = [empty_cache(order) for _ in range(LAYERS)]
        layout, attention = Layout(block_tokens=BLOCK, dtype="bf16", first_block=cached // BLOCK), Attention("dense")
        slots = [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(len(blocks) * BLOCK)]
        with self.client.prefill(tokens, layout=layout, attention=attention) as stream:
            for part in stream:
                keys, values = (t.flatten(0, 1).to(DEVICE) for t in part.torch())  # past the prompt they are zero
                first = part.first_block * BLOCK
                end = first + len(keys) if fills_blocks else min(first + len(keys), len(tokens))
                wanted = slice(max(0, cached - first), end - first)
                write_one_by_one(layers[part.layer], keys[wanted], values[wanted], slots[first:end][wanted])
        return layers

    def test_what_comes_is_what_a_plain_loop_writes(self):
        chance = random.Random(1)
        for order in ("nh2d", "hn2d"):
            engine = Engine(order, self.server)
            self.addCleanup(engine.close)
            # Behind 40 tokens a load begins within a block, which the backend writes.
            for length, cached in ((7, 0), (160, 0), (600, 0), (400, 160), (200, 40)):
                with self.subTest(order, length=length, cached=cached, device=DEVICE):
                    for cache in engine.caches.values():
                        cache.fill_(-1)
                    engine.written = 0
                    tokens = [chance.randrange(256) for _ in range(length)]
                    blocks = list(range(40, 40 + -(-length // BLOCK)))  # neighbours, and some that are none
                    blocks[5:25] = chance.sample(range(120, 200), len(blocks[5:25]))
                    seconds, bad = engine.load(f"{length} after {cached}", tokens, blocks, cached)
                    self.assertEqual(bad, set())
                    is_copied = cached % BLOCK == 0
                    self.assertEqual(engine.written, 0 if is_copied else LAYERS * (length - cached))
                    expected = self.expected(order, tokens, blocks, cached, is_copied)
                    for found, wanted in zip(engine.caches.values(), expected, strict=True):
                        self.assertTrue(torch.equal(found, wanted))
                    print(f"{DEVICE}, {order}: {length - cached} tokens in {1e3 * seconds:.1f} ms", file=sys.stderr)


if __name__ == "__main__":
    BIN_DIR = Path(sys.argv.pop(1)).resolve()
    unittest.main()
