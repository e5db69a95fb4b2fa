"""Compares the frames of a KV cache with what the layout promises as they arrive, then shows them as arrays.

Nothing here reads a network: Reception is told what arrived, by whatever way, and says what it means.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import numpy as np
import xxhash

from prefilld import wire
from prefilld.arrays import NUMPY_DTYPES, to_float32, to_torch
from prefilld.errors import TransferError, data_loss
from prefilld.frames import Frame, read_event
from prefilld.options import Call
from prefilld.resumption import Receipts

if TYPE_CHECKING:
    import torch


def block_shape(layout) -> tuple[int, int, int]:
    """Returns the shape of one block of K or V: [block_tokens, num_heads, head_dim] (NHD, NH2D) or [num_heads,
    block_tokens, head_dim] (HND, HN2D).
    """
    if wire.enum_name("KvOrder", layout.order) in ("hnd", "hn2d"):
        return layout.num_heads, layout.block_tokens, layout.head_dim
    return layout.block_tokens, layout.num_heads, layout.head_dim


def is_interleaved(layout) -> bool:
    """Tells whether K and V lie in one block, head by head."""
    return wire.enum_name("KvOrder", layout.order) in ("nh2d", "hn2d")


def element_type(layout) -> np.dtype:
    return NUMPY_DTYPES[wire.enum_name("DType", layout.dtype)]


def has_scales(layout) -> bool:
    return wire.enum_name("DType", layout.dtype) == "fp8_e4m3"


def scales_shape(layout) -> tuple[int, int, int]:
    """Returns the shape of one block's scales of K or V: block_shape with 1 for the axes that share a scale."""
    first, second, _ = block_shape(layout)
    if wire.enum_name("KvScales", layout.scales) == "per_block":
        by_token = wire.enum_name("KvOrder", layout.order) in ("nhd", "nh2d")
        first, second = (1, second) if by_token else (first, 1)
    return first, second, 1


@dataclass(frozen=True)
class KvBlocks:
    """A run of consecutive blocks of one layer, verified.

    keys, values: [num_blocks, *block_shape(layout)], read-only views of the received bytes. Keys
    are rotated. Positions past the end of the prompt are zero.
    array: all of the received bytes: [2 (K, V), num_blocks, *block_shape(layout)], or of interleaved orders
    [num_blocks, *block_shape(layout)[:2], 2 (K, V), head_dim], so that a block of both is one copy. Of fp8 it has
    the elements, and not the scales, which come behind them.
    key_scales, value_scales: float32, of fp8 alone: [num_blocks, *scales_shape(layout)], so that elements times
    scales is what they stand for.
    layers_computed: layers that were finished when the server sent this.
    """

    layer: int
    first_block: int
    keys: np.ndarray
    values: np.ndarray
    array: np.ndarray
    layers_computed: int
    key_scales: np.ndarray | None = None
    value_scales: np.ndarray | None = None

    def torch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values as tensors of the same memory, which must not be written.

        fp8 is torch.float8_e4m3fn, and ValueError where torch has none (before 2.1); see torch_scales().
        """
        return to_torch(self.keys), to_torch(self.values)

    def torch_scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the scales of keys and values as tensors of the same memory, or None: only fp8 has them."""
        if self.key_scales is None or self.value_scales is None:
            return None
        return to_torch(self.key_scales), to_torch(self.value_scales)

    def float32(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what keys and values stand for, whatever they came in; fp8 is multiplied by its scales."""
        return to_float32(self.keys, self.key_scales), to_float32(self.values, self.value_scales)


# No model comes near these limits, which are those of client/transfer_check.cc. They keep the memory that a transfer
# takes in proportion to its prompt, whatever the sender claims.
_MAX_LAYERS = 1024
_MAX_HEADS = 1024  # and elements of a head


def check_layout(layout, wished, num_tokens: int, fingerprint: str) -> None:
    """Raises TransferError FAILED_PRECONDITION when `layout` contradicts itself or the request `wished`."""

    def expect(field: str, value, expected) -> None:
        if value != expected:
            raise TransferError(
                grpc.StatusCode.FAILED_PRECONDITION, f"KV layout: {field} is {value}, expected {expected}"
            )

    def within(field: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            raise TransferError(
                grpc.StatusCode.FAILED_PRECONDITION, f"KV layout: {field} is {value}, allowed: {least} to {most}"
            )

    expect("num_tokens", layout.num_tokens, num_tokens)
    expect("block_tokens", layout.block_tokens, wished.block_tokens)
    within("num_layers", layout.num_layers, 1, _MAX_LAYERS)
    within("head_dim", layout.head_dim, 1, _MAX_HEADS)
    within("num_kv_heads", layout.num_kv_heads, 1, _MAX_HEADS)
    expect("num_blocks", layout.num_blocks, -(-num_tokens // layout.block_tokens))
    expect("order", wire.enum_name("KvOrder", layout.order), wire.enum_name("KvOrder", wished.order))
    expect("known order", wire.enum_name("KvOrder", layout.order) in wire.enum_names("KvOrder"), True)
    dtype = wire.enum_name("DType", layout.dtype)
    expect("dtype", dtype, wire.enum_name("DType", wished.dtype) if wished.dtype else dtype)
    expect("known dtype", dtype in NUMPY_DTYPES, True)
    scales = 0
    if has_scales(layout):
        scales = wished.scales or wire.enum_value("KvScales", "per_token")
    expect("scales", wire.enum_name("KvScales", layout.scales), wire.enum_name("KvScales", scales))
    expect("first_head", layout.first_head, wished.first_head)
    expect("num_heads", layout.num_heads, wished.num_heads or layout.num_kv_heads - layout.first_head)
    within("num_heads", layout.num_heads, 1, layout.num_kv_heads - layout.first_head)
    expect("first_block", layout.first_block, wished.first_block)
    within("first_block", layout.first_block, 0, layout.num_blocks)
    expect("keys_rotated", layout.keys_rotated, True)
    if fingerprint:
        expect("model_fingerprint", layout.model_fingerprint, fingerprint)


_MAX_DAMAGED_COPIES = 3  # a frame that arrives damaged more often is not asked for once more


class Damaged(Exception):
    """A frame's checksum is wrong, and it can be asked for once more."""


class TransferCheck:
    """Checks frames: those of a lane numbered without gaps, each in place, whole, undamaged, each block once.

    Of a resumable transfer, frames may come again. Safe to use from several threads, one per lane.
    """

    def __init__(self, layout, prompt_logprobs: bool = False, num_lanes: int = 1, resumable: bool = False):
        """prompt_logprobs: whether the result must have log-probabilities of the prompt."""
        self._resumable = resumable
        self.is_beyond_repair = False  # a frame arrived damaged too often, and would again on another stream
        self._damaged: list[dict[int, int]] = [{} for _ in range(num_lanes)]  # copies of frames, by lane
        self._layout = layout
        self._num_logprobs = layout.num_tokens - 1 if prompt_logprobs else 0
        self._shape = block_shape(layout)
        self._interleaved = is_interleaved(layout)
        self._dtype = element_type(layout)
        self._scales_shape = scales_shape(layout) if has_scales(layout) else None
        self._arrived = np.zeros((layout.num_layers, layout.num_blocks), bool)
        self._arrived[:, : layout.first_block] = True
        self._frames = [0] * num_lanes
        self._lock = threading.Lock()  # of what arrived; the counts of a lane are also read beside its thread

    def received(self, lane: int) -> int:
        """Returns the number of the lane's first frame that has not arrived undamaged."""
        with self._lock:
            return min(self._damaged[lane], default=self._frames[lane])

    def _has_arrived(self, frame: Frame) -> bool:
        """Tells whether all blocks of a frame are here.

        A frame whose number was damaged on the way looks like one that comes again, but for its blocks.
        """
        end = frame.first_block + frame.num_blocks
        if frame.layer >= self._layout.num_layers or frame.num_blocks == 0 or end > self._layout.num_blocks:
            return False
        with self._lock:
            return bool(self._arrived[frame.layer, frame.first_block : end].all())

    def take(self, frame: Frame, lane: int = 0) -> KvBlocks | None:
        """Returns what a frame brings, or None if it came before. Raises Damaged of a resumable transfer."""
        where = f"frame {frame.sequence} of lane {lane} (layer {frame.layer}, blocks from {frame.first_block})"
        if frame.lane != lane:
            raise data_loss(f"{where} says that it is of lane {frame.lane}")
        is_next, damaged = frame.sequence == self._frames[lane], self._damaged[lane]
        if not is_next and frame.sequence not in damaged:
            if self._resumable and frame.sequence < self._frames[lane] and self._has_arrived(frame):
                return None
            raise data_loss(f"{where} arrived where frame {self._frames[lane]} was due")
        end = frame.first_block + frame.num_blocks
        if frame.layer >= self._layout.num_layers or frame.num_blocks == 0 or end > self._layout.num_blocks:
            raise data_loss(f"{where} with {frame.num_blocks} blocks lies outside the layout")
        shape = self._payload_shape(frame, self._shape)
        num_elements, num_scales = int(np.prod(shape)), 0
        if self._scales_shape:
            num_scales = int(np.prod(self._payload_shape(frame, self._scales_shape)))
        size = num_elements * self._dtype.itemsize + num_scales * 4
        if len(frame.payload) != size:
            raise data_loss(f"{where} has a payload of {len(frame.payload)} bytes; {size} are due")
        checksum = xxhash.xxh3_64_intdigest(frame.payload)
        if checksum != frame.checksum:
            if self._resumable and self._may_be_repaired(frame.sequence, damaged):
                with self._lock:
                    damaged[frame.sequence] = damaged.get(frame.sequence, 0) + 1
                    self._frames[lane] += is_next
                raise Damaged
            if frame.sequence in damaged:
                self.is_beyond_repair = True
            raise data_loss(f"{where}: checksum of the payload is {checksum:016x}, sent was {frame.checksum:016x}")
        with self._lock:
            arrived = self._arrived[frame.layer, frame.first_block : end]
            if arrived.any():
                raise data_loss(f"{where} brings a block that arrived before or was not wanted")
            arrived[:] = True
            self._frames[lane] += is_next
            damaged.pop(frame.sequence, None)
        array = _view(frame.payload, self._dtype, 0, num_elements).reshape(shape)
        keys, values = self._keys_and_values(array)
        scales: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        if self._scales_shape:
            flat = _view(frame.payload, np.dtype("<f4"), num_elements, num_scales)
            scales = self._keys_and_values(flat.reshape(self._payload_shape(frame, self._scales_shape)))
        return KvBlocks(frame.layer, frame.first_block, keys, values, array, frame.layers_computed, *scales)

    def _payload_shape(self, frame: Frame, block: tuple[int, int, int]) -> tuple[int, ...]:
        if self._interleaved:
            return (frame.num_blocks, *block[:2], 2, block[2])
        return (2, frame.num_blocks, *block)

    def _keys_and_values(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, values = np.moveaxis(array, 3, 0) if self._interleaved else array
        return keys, values

    def _may_be_repaired(self, sequence: int, damaged: dict[int, int]) -> bool:
        """Each frame brings a block that is missing, so no more of them are awaited than blocks are."""
        if sequence in damaged:
            return damaged[sequence] < _MAX_DAMAGED_COPIES
        with self._lock:
            return sum(len(frames) for frames in self._damaged) < int((~self._arrived).sum())

    def finish(self, result) -> None:
        sent = list(result.frames_per_lane)
        if sum(sent) != sum(self._frames) or (len(sent) == len(self._frames) and sent != self._frames):
            raise data_loss(f"{sum(self._frames)} frames arrived of {sum(sent)} sent; by lane {self._frames} of {sent}")
        missing = int((~self._arrived).sum())
        if missing:
            raise data_loss(f"{missing} blocks were never sent, though the server says it is done")
        for name in ("prompt_logprobs", "best_logprobs"):
            if len(getattr(result, name)) != self._num_logprobs:
                raise data_loss(f"{len(getattr(result, name))} {name} arrived; {self._num_logprobs} are due")


def _view(payload, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    array = np.frombuffer(payload, dtype, count, offset)
    if not array.flags.aligned:  # the payload stands where its message's other fields end
        array = np.frombuffer(bytes(payload[offset : offset + count * dtype.itemsize]), dtype)
    return array


class Reception:
    """Keeps what one Prefill or AttachReceiver call has brought so far, whoever reads its lanes.

    Its methods raise TransferError when the server breaks its promise. take() may run in several
    threads at once, one per lane.
    """

    def __init__(self, call: Call):
        """call: what was sent."""
        self._request = call.request
        self._num_tokens = call.num_tokens
        # A further receiver can neither have the KV sent elsewhere nor ask for log-probabilities.
        owns = call.method == "Prefill"
        self._is_pushed = owns and (call.request.HasField("deliver_to") or len(call.request.pushes) > 0)
        self._has_logprobs = owns and call.request.prompt_logprobs
        self._check: TransferCheck | None = None
        self.accepted = None
        self.result = None
        self.progress = 0  # grows with everything new that arrives
        self.receipts = Receipts() if call.request.resume_key else None  # None: the request is not resumable

    def attachments(self) -> list:
        """Returns the AttachLaneRequest of each further lane, once accepted."""
        accepted = self.accepted
        return [
            wire.AttachLaneRequest(
                request_id=accepted.request_id, lane=lane, lane_key=accepted.lane_key, receiver=accepted.receiver
            )
            for lane in range(1, accepted.num_lanes)
        ]

    def take(self, lane: int, data: bytes):
        """Takes one message; returns the KvBlocks or the Progress that it brought, or None."""
        event = read_event(data)
        if isinstance(event, Frame):
            if self._check is None:
                raise data_loss("a frame came before Accepted")
            if self._is_pushed:
                raise data_loss("a frame came here though the cache is delivered elsewhere")
            return self._take_frame(event, lane)
        if lane != 0:
            raise data_loss(f"lane {lane} carries more than frames")
        kind = event.WhichOneof("event")
        if self.receipts and self.accepted is not None and kind == "accepted":
            self._check_again(event.accepted)
            return None
        if (kind == "accepted") == (self.accepted is not None):
            raise data_loss(
                "Accepted came twice" if self.accepted is not None else "the stream does not begin with Accepted"
            )
        if self.result is not None and not (self.receipts and kind == "result"):
            raise data_loss("an event came after the result")
        self.progress += 1
        if kind == "accepted":
            self._accept(event.accepted)
        elif kind == "progress":
            return event.progress
        elif kind == "result":
            self.result = event.result
        return None  # or an event of a later version

    def _take_frame(self, frame: Frame, lane: int) -> KvBlocks | None:
        try:
            blocks = self._check.take(frame, lane)
        except Damaged:
            self.receipts.note(lane, self._check.received(lane), (frame.sequence,))
            return None
        if blocks is not None:
            self.progress += 1
            if self.receipts:
                self.receipts.note(lane, self._check.received(lane))
        return blocks

    def _check_again(self, accepted) -> None:
        before = self.accepted
        if accepted.request_id != before.request_id or accepted.layout != before.layout:
            raise data_loss("a resumed stream is that of another request")

    def received(self, lane: int) -> int:
        """Returns from which frame on a stream of this lane has to bring them."""
        return 0 if self._check is None else self._check.received(lane)

    @property
    def may_resume(self) -> bool:
        """Tells whether a stream that has broken may be attached again."""
        return self.receipts is not None and not (self._check and self._check.is_beyond_repair)

    @property
    def window(self) -> float | None:
        """Seconds for which the server waits when a stream has broken; None before it has accepted."""
        return None if self.accepted is None else self.accepted.resume_window_ms / 1000

    def _accept(self, accepted) -> None:
        request = self._request
        check_layout(accepted.layout, request.layout, self._num_tokens, request.model_fingerprint)
        if not 1 <= accepted.num_lanes <= max(1, request.num_lanes):
            raise TransferError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"num_lanes is {accepted.num_lanes}, asked for were {request.num_lanes}",
            )
        if not accepted.resume_window_ms:
            self.receipts = None
        resumable = self.receipts is not None
        self._check = TransferCheck(accepted.layout, self._has_logprobs, accepted.num_lanes, resumable)
        self.accepted = accepted

    def finish(self) -> None:
        """Says that every lane has ended with OK."""
        if self.accepted is None:
            raise data_loss("the stream does not begin with Accepted")
        if self.result is None:
            raise data_loss("the stream ended without a result")
        if not self._is_pushed:
            self._check.finish(self.result)


class WholeCache:
    """Puts blocks into one array: [num_layers, 2 (K, V), num_blocks, *block_shape(layout)], writable.

    num_blocks counts from layout.first_block. K and V lie apart here in every order. With NHD or NH2D and all blocks, `.reshape(layers, 2, -1, heads,
    head_dim)[:, :, :num_tokens]` is the cache by token. fp8 becomes float32 here, times its scales.
    """

    def __init__(self, layout):
        self._first = layout.first_block
        shape = (layout.num_layers, 2, layout.num_blocks - layout.first_block, *block_shape(layout))
        self.array = np.empty(shape, np.float32 if has_scales(layout) else element_type(layout))

    def store(self, blocks: KvBlocks) -> None:
        begin = blocks.first_block - self._first
        keys, values = (blocks.keys, blocks.values) if blocks.key_scales is None else blocks.float32()
        self.array[blocks.layer, 0, begin : begin + len(keys)] = keys
        self.array[blocks.layer, 1, begin : begin + len(keys)] = values
