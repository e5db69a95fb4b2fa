"""Tests what the Python client makes of KV in fp8, and what it refuses.

Exits with 77 (skipped, for CTest) without the client's packages.
"""

import contextlib
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "client" / "python"))
try:
    import numpy as np
    from played_server import BLOCKS, TOKENS, frame, layout
    from prefilld import Layout, TransferError, to_float32, wire
    from prefilld.transfer import TransferCheck, WholeCache, check_layout
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class Fp8(unittest.TestCase):
    """Blocks of fp8, whose scales follow the elements."""

    def blocks(self, order, scales, num_scales):
        described = layout(
            dtype=wire.enum_value("DType", "fp8_e4m3"),
            order=wire.enum_value("KvOrder", order),
            scales=wire.enum_value("KvScales", scales),
        )
        elements = (np.arange(2 * BLOCKS * 16 * 2 * 4) % 127).astype(np.uint8)
        factors = np.arange(num_scales, dtype="<f4") + 1
        payload = elements.tobytes() + factors.tobytes()
        for wrong in (payload[:-4], payload + bytes(4), elements.tobytes()):
            with self.assertRaisesRegex(TransferError, f"{len(payload)} are due"):
                TransferCheck(described).take(frame(0, payload=wrong).kv_frame)
        return elements, factors, TransferCheck(described).take(frame(0, payload=payload).kv_frame), described

    def test_scales_stand_for_what_the_contract_says(self):
        shapes = {"nhd": (BLOCKS, 16, 2, 1), "hnd": (BLOCKS, 2, 16, 1), "nh2d": (BLOCKS, 16, 2, 1), "hn2d": (BLOCKS, 2, 16, 1)}
        for order, shape in shapes.items():
            for scales in ("per_token", "per_block"):
                expected = tuple(1 if n == 16 and scales == "per_block" else n for n in shape)
                count = 2 * int(np.prod(expected))
                _, factors, blocks, _ = self.blocks(order, scales, count)
                self.assertEqual((blocks.keys.dtype, blocks.keys.shape[:-1] + (1,)), (np.uint8, shape))
                self.assertEqual((blocks.key_scales.dtype, blocks.key_scales.shape), (np.float32, expected))
                if order in ("nhd", "hnd"):
                    given = (factors[: count // 2], factors[count // 2 :])
                else:
                    given = (factors[::2], factors[1::2])
                self.assertEqual(blocks.key_scales.ravel().tolist(), given[0].tolist())
                self.assertEqual(blocks.value_scales.ravel().tolist(), given[1].tolist())
                for whole, elements, factor in zip(
                    blocks.float32(), (blocks.keys, blocks.values), (blocks.key_scales, blocks.value_scales)
                ):
                    np.testing.assert_array_equal(whole, to_float32(elements) * factor)

    def test_bytes_are_the_numbers_of_e4m3(self):
        values = to_float32(np.array([0x00, 0x01, 0x08, 0x38, 0xC1, 0x7E, 0xFE, 0x7F], np.uint8))
        self.assertEqual(values[:7].tolist(), [0, 2**-9, 2**-6, 1, -2.25, 448, -448])
        self.assertTrue(np.isnan(values[7]))
        with contextlib.suppress(ImportError):
            import ml_dtypes

            bits = np.arange(256, dtype=np.uint8)
            np.testing.assert_array_equal(to_float32(bits), bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))

    def test_a_whole_cache_is_float32(self):
        _, _, blocks, described = self.blocks("hnd", "per_token", 2 * BLOCKS * 16 * 2)
        cache = WholeCache(described)
        cache.store(blocks)
        self.assertEqual(cache.array.dtype, np.float32)
        np.testing.assert_array_equal(cache.array[0, 1], blocks.float32()[1])

    def test_tensors_share_the_memory(self):
        try:
            import torch
        except ImportError:
            self.skipTest("torch is not here")
        elements, _, blocks, _ = self.blocks("nhd", "per_block", 2 * BLOCKS * 2)
        if not hasattr(torch, "float8_e4m3fn"):
            with self.assertRaisesRegex(ValueError, "float8_e4m3fn"):
                blocks.torch()
        else:
            keys, values = blocks.torch()
            self.assertEqual((keys.dtype, keys.data_ptr()), (torch.float8_e4m3fn, blocks.keys.ctypes.data))
            self.assertEqual(keys.view(torch.uint8).flatten().tolist(), elements[: elements.size // 2].tolist())
            key_scales, value_scales = blocks.torch_scales()
            np.testing.assert_array_equal((values.float() * value_scales).numpy(), blocks.float32()[1])
        self.assertEqual(blocks.torch_scales()[0].data_ptr(), blocks.key_scales.ctypes.data)

    def test_a_layout_that_has_no_such_scales_is_refused(self):
        fp8, per_block = wire.enum_value("DType", "fp8_e4m3"), wire.enum_value("KvScales", "per_block")
        for wished, fields in (
            (Layout(dtype="fp8_e4m3", scales="per_token"), dict(dtype=fp8, scales=per_block)),
            (Layout(dtype="fp8_e4m3"), dict(dtype=fp8, scales=per_block)),
            (Layout(dtype="fp8_e4m3"), dict(dtype=fp8)),
            (Layout(), dict(scales=per_block)),
        ):
            with self.assertRaisesRegex(TransferError, "scales is"):
                check_layout(layout(**fields), wished.to_wire(), len(TOKENS), "")
        kept = Layout(dtype="fp8_e4m3", scales="per_block")
        self.assertEqual(Layout.from_wire(kept.to_wire()), kept)


if __name__ == "__main__":
    unittest.main()
