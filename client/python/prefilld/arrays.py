"""Received bytes as numpy arrays, and as torch tensors where torch is there."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# numpy has no bfloat16: its bits arrive as uint16 (see to_float32).
NUMPY_DTYPES = {"bf16": np.dtype("<u2"), "fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}


def to_float32(array: np.ndarray) -> np.ndarray:
    """Converts values of bf16 (uint16 bits), fp16 or fp32 to float32, in an array of the same shape."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Returns a CPU tensor of the same memory, of dtype bfloat16 where the array has bf16 as uint16 bits.

    The tensor has the array's strides and keeps it alive. An array that is read-only, such as those of KvBlocks,
    must not be written through the tensor either, which torch cannot know.
    """
    import torch

    dtype = {2: torch.bfloat16, 4: torch.float32}[array.itemsize]
    if array.dtype == np.float16:
        dtype = torch.float16
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        raise ValueError(f"array of strides {array.strides}: must be multiples of {array.itemsize}, 0 at least")
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype)
    # torch warns of each read-only buffer that it shares, so it gets one that does not say so.
    span = array.itemsize + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides))
    memory = (ctypes.c_uint8 * span).from_address(array.ctypes.data)
    memory.owner = array
    strides = [stride // array.itemsize for stride in array.strides]
    return torch.frombuffer(memory, dtype=dtype).as_strided(array.shape, strides)
