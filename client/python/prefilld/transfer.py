"""Compares the frames of a KV cache with what the layout promises as they arrive, then shows them as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import numpy as np
import xxhash

from prefilld import wire

# numpy has no bfloat16: its bits arrive as uint16 (see to_float32).
NUMPY_DTYPES = {"bf16": np.dtype("<u2"), "fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}


class TransferError(Exception):
    """The transfer is not what was asked for or promised; nothing that it brought may be used.

    code: DATA_LOSS (a frame is damaged, missing or out of place, or the stream ended without a
    result) or FAILED_PRECONDITION (the layout is not the one asked for).
    """

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


def to_float32(array: np.ndarray) -> np.ndarray:
    """Converts values of bf16 (uint16 bits), fp16 or fp32 to float32, in an array of the same shape."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def block_shape(layout) -> tuple[int, int, int]:
    """Returns the shape of one block of K or V: [block_tokens, num_heads, head_dim] (NHD) or [num_heads, block_tokens,
    head_dim].
    """
    if wire.enum_name("KvOrder", layout.order) == "hnd":
        return layout.num_heads, layout.block_tokens, layout.head_dim
    return layout.block_tokens, layout.num_heads, layout.head_dim


def element_type(layout) -> np.dtype:
    return NUMPY_DTYPES[wire.enum_name("DType", layout.dtype)]


@dataclass(frozen=True)
class KvBlocks:
    """A run of consecutive blocks of one layer, verified.

    keys, values: [num_blocks, *block_shape(layout)], read-only views of the received bytes. Keys
    are rotated. Positions past the end of the prompt are zero.
    layers_computed: layers that were finished when the server sent this.
    """

    layer: int
    first_block: int
    keys: np.ndarray
    values: np.ndarray
    layers_computed: int


def check_layout(layout, wished, num_tokens: int, fingerprint: str) -> None:
    """Raises TransferError FAILED_PRECONDITION when `layout` contradicts itself or the request `wished`."""

    def expect(field: str, value, expected) -> None:
        if value != expected:
            raise TransferError(
                grpc.StatusCode.FAILED_PRECONDITION, f"KV layout: {field} is {value}, expected {expected}"
            )

    expect("num_tokens", layout.num_tokens, num_tokens)
    expect("block_tokens", layout.block_tokens, wished.block_tokens)
    expect("num_blocks", layout.num_blocks, -(-num_tokens // layout.block_tokens))
    expect("order", layout.order, wished.order)
    dtype = wire.enum_name("DType", layout.dtype)
    expect("dtype", dtype, wire.enum_name("DType", wished.dtype) if wished.dtype else dtype)
    expect("known dtype", dtype in NUMPY_DTYPES, True)
    expect("first_head", layout.first_head, wished.first_head)
    expect("num_heads", layout.num_heads, wished.num_heads or layout.num_kv_heads - layout.first_head)
    expect("first_block", layout.first_block, wished.first_block)
    expect("keys_rotated", layout.keys_rotated, True)
    if fingerprint:
        expect("model_fingerprint", layout.model_fingerprint, fingerprint)


class TransferCheck:
    """Checks the frames of one lane: numbered without gaps, in place, whole, undamaged, each block once."""

    def __init__(self, layout, prompt_logprobs: bool = False):
        """prompt_logprobs: whether the result must have log-probabilities of the prompt."""
        self._layout = layout
        self._num_logprobs = layout.num_tokens - 1 if prompt_logprobs else 0
        self._shape = block_shape(layout)
        self._dtype = element_type(layout)
        self._arrived = np.zeros((layout.num_layers, layout.num_blocks), bool)
        self._arrived[:, : layout.first_block] = True
        self._frames = 0

    def take(self, frame) -> KvBlocks:
        where = f"frame {frame.sequence} (layer {frame.layer}, blocks from {frame.first_block})"
        if frame.sequence != self._frames:
            raise _loss(f"{where} arrived where frame {self._frames} was due")
        end = frame.first_block + frame.num_blocks
        if frame.layer >= self._layout.num_layers or frame.num_blocks == 0 or end > self._layout.num_blocks:
            raise _loss(f"{where} with {frame.num_blocks} blocks lies outside the layout")
        shape = (2, frame.num_blocks, *self._shape)
        size = int(np.prod(shape)) * self._dtype.itemsize
        if len(frame.payload) != size:
            raise _loss(f"{where} has a payload of {len(frame.payload)} bytes; {size} are due")
        arrived = self._arrived[frame.layer, frame.first_block : end]
        if arrived.any():
            raise _loss(f"{where} brings a block that arrived before or was not wanted")
        checksum = xxhash.xxh3_64_intdigest(frame.payload)
        if checksum != frame.checksum:
            raise _loss(f"{where}: checksum of the payload is {checksum:016x}, sent was {frame.checksum:016x}")
        arrived[:] = True
        self._frames += 1
        keys, values = np.frombuffer(frame.payload, self._dtype).reshape(shape)
        return KvBlocks(frame.layer, frame.first_block, keys, values, frame.layers_computed)

    def finish(self, result) -> None:
        sent = sum(result.frames_per_lane)
        if sent != self._frames:
            raise _loss(f"{self._frames} frames arrived of {sent} sent")
        missing = int((~self._arrived).sum())
        if missing:
            raise _loss(f"{missing} blocks were never sent, though the server says it is done")
        for name in ("prompt_logprobs", "best_logprobs"):
            if len(getattr(result, name)) != self._num_logprobs:
                raise _loss(f"{len(getattr(result, name))} {name} arrived; {self._num_logprobs} are due")


def _loss(message: str) -> TransferError:
    return TransferError(grpc.StatusCode.DATA_LOSS, message)
