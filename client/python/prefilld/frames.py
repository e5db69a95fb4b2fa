"""Reads the events of a stream. The payload of a KV frame is not copied: it stays where gRPC put it."""

from __future__ import annotations

from typing import NamedTuple

from prefilld import wire
from prefilld.errors import data_loss


class Frame(NamedTuple):
    """A KvFrame of kv.proto, with the payload as a view of the received message."""

    lane: int
    sequence: int
    layer: int
    first_block: int
    num_blocks: int
    checksum: int
    layers_computed: int
    payload: memoryview


_VARINT, _FIXED64, _BYTES = 0, 1, 2
_FIELDS = {
    field.number: (field.name, {field.TYPE_FIXED64: _FIXED64, field.TYPE_BYTES: _BYTES}.get(field.type, _VARINT))
    for field in wire.KvFrame.DESCRIPTOR.fields
}
_KV_FRAME_TAG = wire.PrefillEvent.DESCRIPTOR.fields_by_name["kv_frame"].number << 3 | _BYTES
_ABSENT = dict.fromkeys(Frame._fields, 0) | {"payload": memoryview(b"")}


class _Unusual(Exception):
    """The message is encoded in a way that only protobuf's own parser knows."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _Unusual


def _read_frame(data: memoryview) -> Frame:
    tag, at = _varint(data, 0)
    size, at = _varint(data, at)
    if tag != _KV_FRAME_TAG or at + size != len(data):
        raise _Unusual
    found = dict(_ABSENT)
    while at < len(data):
        tag, at = _varint(data, at)
        name, kind = _FIELDS.get(tag >> 3, (None, None))
        if kind != tag & 7:
            raise _Unusual
        if kind == _VARINT:
            value, at = _varint(data, at)
        elif kind == _FIXED64:
            value, at = int.from_bytes(data[at : at + 8], "little"), at + 8
        else:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        if at > len(data):
            raise _Unusual
        if name in found:
            found[name] = value
    return Frame(**found)


def _frame_of(message) -> Frame:
    fields = {name: getattr(message, name) for name in Frame._fields if name != "payload"}
    return Frame(**fields, payload=memoryview(message.payload))


def read_event(data: bytes, kind=wire.PrefillEvent):
    """Returns a Frame, or the message of anything else. Raises TransferError for bytes that are neither.

    kind: PrefillEvent, or ReceiveRequest, which has its frames in a field of the same number.
    """
    if data and data[0] == _KV_FRAME_TAG:
        try:
            return _read_frame(memoryview(data))
        except (_Unusual, IndexError):
            pass
    try:
        message = kind.FromString(data)
    except Exception as error:  # each implementation of protobuf has its own DecodeError
        raise data_loss(f"a message of {len(data)} bytes is no {kind.DESCRIPTOR.name}: {error}") from None
    return _frame_of(message.kv_frame) if message.HasField("kv_frame") else message
