"""Tests how the vLLM connector finds the order of a cache, which needs no vLLM.

Exits with 77 (skipped, for CTest) without torch or the client's packages.
"""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import torch
    from prefilld.vllm.cache_order import interleaved_order, rows_of
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class CacheOrder(unittest.TestCase):
    """The order is told by what the backend writes, not by the shape of its cache."""

    TOKENS, HEADS, DIM = 32, 3, 4

    def order(self, cache, write=None, heads=HEADS):
        def update(keys, values, cache, slots):
            self.assertEqual(len(cache), 1)
            both = torch.cat([keys, values], -1)
            cache[0] = both if cache.shape[1] == self.TOKENS else both.transpose(0, 1)

        return interleaved_order(cache, self.TOKENS, heads, self.DIM, write or update)

    def test_is_found_whatever_the_shape(self):
        by_token = torch.zeros(5, self.TOKENS, self.HEADS, 2 * self.DIM)
        by_head = torch.zeros(5, self.HEADS, self.TOKENS, 2 * self.DIM)
        for cache, order in ((by_token, "nh2d"), (by_head, "hn2d")):
            self.assertEqual(self.order(cache), order)
            self.assertEqual(self.order(cache.bfloat16()), order)
            self.assertEqual(self.order(cache.transpose(1, 2)), order)  # vLLM shows a view of its memory
            self.assertEqual(rows_of(cache).shape, (5, cache[0].numel()))
            self.assertFalse(cache.any(), "the cache itself was not written")

    def test_is_none_for_every_other(self):
        by_head = torch.zeros(5, self.HEADS, self.TOKENS, 2 * self.DIM)

        def with_keys_transposed(keys, values, cache, slots):  # as on CPUs
            rows = cache.view(self.HEADS, 2, -1)
            rows[:, 0] = keys.permute(1, 2, 0).flatten(1)
            rows[:, 1] = values.transpose(0, 1).flatten(1)

        def not_at_all(keys, values, cache, slots):
            raise RuntimeError("two blocks at least")

        for write in (with_keys_transposed, not_at_all, lambda *_: None):
            self.assertIsNone(self.order(by_head, write))
        self.assertIsNone(self.order(torch.zeros(2, 5, self.TOKENS, self.HEADS, self.DIM)))
        self.assertIsNone(self.order(by_head[:, :, :, :4]))
        self.assertIsNone(self.order(torch.zeros(10, *by_head.shape[1:])[::2]))
        self.assertIsNone(self.order(by_head, heads=2))


if __name__ == "__main__":
    unittest.main()
