"""Messages, enums and methods of proto/prefill/v1, made from descriptors at import.

There is no generated code, hence no pairing of generator and runtime versions to get right. A
message class is an attribute of this module: `wire.PrefillRequest(token_ids=[1, 2])`. Fields and
their meaning: proto/prefill/v1/*.proto.
"""

from __future__ import annotations

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from prefilld.descriptors import load_descriptors

_PACKAGE = "prefill.v1"

_files = descriptor_pb2.FileDescriptorSet.FromString(load_descriptors()).file
# The pool is private, because other packages may bring their copies of google/rpc/*.proto.
_pool = descriptor_pool.DescriptorPool()
for _file in _files:
    _pool.AddSerializedFile(_file.SerializeToString())


if hasattr(message_factory, "GetMessageClass"):
    _class_of = message_factory.GetMessageClass
else:  # protobuf before 4.22
    _class_of = message_factory.MessageFactory(_pool).GetPrototype


def _message_class(full_name: str):
    return _class_of(_pool.FindMessageTypeByName(full_name))


for _file in _files:
    if _file.package == _PACKAGE:
        for _message in _file.message_type:
            globals()[_message.name] = _message_class(f"{_PACKAGE}.{_message.name}")
RpcStatus = _message_class("google.rpc.Status")
RetryInfo = _message_class("google.rpc.RetryInfo")


def _prefix(enum: str) -> str:
    """Returns what stands before each value's name: AttentionPolicy -> ATTENTION_POLICY_, DType -> DTYPE_."""
    first = _pool.FindEnumTypeByName(f"{_PACKAGE}.{enum}").values_by_number[0].name
    return first.removesuffix("UNSPECIFIED")


def enum_names(enum: str) -> list[str]:
    """Returns every name that enum_value() takes, but "unspecified"."""
    values = _pool.FindEnumTypeByName(f"{_PACKAGE}.{enum}").values
    return [v.name.removeprefix(_prefix(enum)).lower() for v in values if v.number != 0]


def enum_value(enum: str, name: str) -> int:
    """Turns ("AttentionPolicy", "share") into 3. Raises ValueError that names what is allowed."""
    values = _pool.FindEnumTypeByName(f"{_PACKAGE}.{enum}").values_by_name
    full_name = _prefix(enum) + name.upper()
    if full_name not in values:
        allowed = ", ".join(v.removeprefix(_prefix(enum)).lower() for v in values)
        raise ValueError(f"{enum} {name!r} unknown; one of {allowed}")
    return values[full_name].number


def enum_name(enum: str, number: int) -> str:
    """Turns ("AttentionPolicy", 3) into "share", and a value newer than this contract into its number, such as "17"."""
    value = _pool.FindEnumTypeByName(f"{_PACKAGE}.{enum}").values_by_number.get(number)
    return str(number) if value is None else value.name.removeprefix(_prefix(enum)).lower()


# The streams with KV frames. Their messages are left as bytes, because parsing would copy each payload twice.
_UNPARSED = ("Prefill", "AttachLane", "AttachReceiver", "Resume")


class Stub:
    """The methods of one service as attributes, which are called like those of a generated stub.

    The channel is one of grpc or of grpc.aio. Streams that carry KV frames bring bytes, for frames.read_event().
    """

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel, service: str):
        for method in self._methods(service):
            kind = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            answer = _message_class(method.output_type.lstrip("."))
            call = getattr(channel, kind)(
                f"/{_PACKAGE}.{service}/{method.name}",
                request_serializer=_message_class(method.input_type.lstrip(".")).SerializeToString,
                response_deserializer=None if method.name in _UNPARSED else answer.FromString,
            )
            setattr(self, method.name, call)

    @staticmethod
    def _methods(service: str):
        for file in _files:
            for candidate in file.service:
                if file.package == _PACKAGE and candidate.name == service:
                    return candidate.method
        raise ValueError(f"service {service!r} unknown")
