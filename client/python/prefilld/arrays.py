"""Received bytes as numpy arrays, and as torch tensors where torch is there."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# numpy has no bfloat16 and no fp8: their bits arrive as uint16 and uint8 (see to_float32).
NUMPY_DTYPES = {
    "bf16": np.dtype("<u2"),
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
    "fp8_e4m3": np.dtype("u1"),
}


def _e4m3_values() -> np.ndarray:
    """Returns what each byte of fp8 e4m3 stands for: 4 bits of exponent with bias 7, 3 of mantissa."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    values = np.where(exponent == 0, mantissa, (8 + mantissa) << np.maximum(exponent - 1, 0)) / np.float32(512)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3_VALUES = _e4m3_values()


def to_float32(array: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """Converts values of bf16 (uint16 bits), fp16, fp32 or fp8 e4m3 (uint8 bits) to float32, in the same shape.

    scales: those of fp8, such as KvBlocks.key_scales; without them the elements stand for themselves.
    """
    if array.dtype == np.uint8:
        values = _E4M3_VALUES[array]
        return values if scales is None else values * scales
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Returns a CPU tensor of the same memory: bfloat16 where the array has uint16 bits, float8_e4m3fn where uint8.

    The tensor has the array's strides and keeps it alive. An array that is read-only, such as those of KvBlocks,
    must not be written through the tensor either, which torch cannot know.
    """
    import torch

    if array.dtype == np.uint8:
        if not hasattr(torch, "float8_e4m3fn"):
            raise ValueError(f"torch {torch.__version__} has no float8_e4m3fn; 2.1 or later has")
        dtype = torch.float8_e4m3fn
    elif array.dtype == np.float16:
        dtype = torch.float16
    else:
        dtype = {2: torch.bfloat16, 4: torch.float32}[array.itemsize]
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        raise ValueError(f"array of strides {array.strides}: must be multiples of {array.itemsize}, 0 at least")
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype)
    # torch warns of each read-only buffer that it shares, so it gets one that does not say so.
    span = array.itemsize + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides))
    memory = (ctypes.c_uint8 * span).from_address(array.ctypes.data)
    memory.owner = array
    strides = [stride // array.itemsize for stride in array.strides]
    # torch reads no buffer as fp8, but lets its bytes be seen so.
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
    return flat.as_strided(array.shape, strides)
