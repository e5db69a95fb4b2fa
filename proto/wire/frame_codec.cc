#include "proto/wire/frame_codec.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/proto_buffer_reader.h>
#include <xxhash.h>
#if defined(__x86_64__)
#include <xxh_x86dispatch.h>  // the same functions, with the widest vectors that the processor has
#endif

#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/receiver.pb.h"

namespace prefilld::wire {
namespace {

using ::google::protobuf::internal::WireFormatLite;
using ::google::protobuf::io::CodedInputStream;
using ::google::protobuf::io::CodedOutputStream;
using ::prefill::v1::KvFrame;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::ReceiveRequest;

constexpr int kKvFrameField = PrefillEvent::kKvFrameFieldNumber;
static_assert(kKvFrameField == int{ReceiveRequest::kKvFrameFieldNumber},
              "one encoding serves the response stream and the push stream");
constexpr uint32_t kKvFrameTag =
    WireFormatLite::MakeTag(kKvFrameField, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
constexpr uint32_t kPayloadTag = WireFormatLite::MakeTag(KvFrame::kPayloadFieldNumber,
                                                         WireFormatLite::WIRETYPE_LENGTH_DELIMITED);

// One field of a KvFrame: where it lies in a FrameHeader and in the message, and how its type is
// written and read.
template <typename T, WireFormatLite::WireType kWireType>
struct Field {
  int number;
  T FrameHeader::*member;
  T (KvFrame::*get)() const;

  constexpr uint32_t tag() const { return WireFormatLite::MakeTag(number, kWireType); }

  uint8_t* Write(const FrameHeader& header, uint8_t* out) const {
    const T value = header.*member;
    out = CodedOutputStream::WriteTagToArray(tag(), out);
    if constexpr (kWireType == WireFormatLite::WIRETYPE_FIXED64) {
      return CodedOutputStream::WriteLittleEndian64ToArray(value, out);
    } else {
      return CodedOutputStream::WriteVarint64ToArray(value, out);
    }
  }

  bool Read(CodedInputStream& in, FrameHeader& header) const {
    if constexpr (kWireType == WireFormatLite::WIRETYPE_FIXED64) {
      return in.ReadLittleEndian64(&(header.*member));
    } else if constexpr (sizeof(T) == sizeof(uint32_t)) {
      return in.ReadVarint32(&(header.*member));
    } else {
      return in.ReadVarint64(&(header.*member));
    }
  }
};

template <typename T>
constexpr auto Varint(int number, T FrameHeader::*member, T (KvFrame::*get)() const) {
  return Field<T, WireFormatLite::WIRETYPE_VARINT>{number, member, get};
}

constexpr auto Fixed64(int number, uint64_t FrameHeader::*member,
                       uint64_t (KvFrame::*get)() const) {
  return Field<uint64_t, WireFormatLite::WIRETYPE_FIXED64>{number, member, get};
}

// Every field but the payload, in the order in which they are written.
constexpr std::tuple kFields = {
    Varint(KvFrame::kLaneFieldNumber, &FrameHeader::lane, &KvFrame::lane),
    Varint(KvFrame::kSequenceFieldNumber, &FrameHeader::sequence, &KvFrame::sequence),
    Varint(KvFrame::kLayerFieldNumber, &FrameHeader::layer, &KvFrame::layer),
    Varint(KvFrame::kFirstBlockFieldNumber, &FrameHeader::first_block, &KvFrame::first_block),
    Varint(KvFrame::kNumBlocksFieldNumber, &FrameHeader::num_blocks, &KvFrame::num_blocks),
    Fixed64(KvFrame::kChecksumFieldNumber, &FrameHeader::checksum, &KvFrame::checksum),
    Varint(KvFrame::kSentAtUsFieldNumber, &FrameHeader::sent_at_us, &KvFrame::sent_at_us),
    Varint(KvFrame::kLayersComputedFieldNumber, &FrameHeader::layers_computed,
           &KvFrame::layers_computed),
    Varint(KvFrame::kSharedOffsetFieldNumber, &FrameHeader::shared_offset, &KvFrame::shared_offset),
    Varint(KvFrame::kSharedBytesFieldNumber, &FrameHeader::shared_bytes, &KvFrame::shared_bytes)};

// Tags below 16 take one byte, a varint ten at most; the payload's tag and length come last.
constexpr size_t kMaxFieldsBytes = (std::tuple_size_v<decltype(kFields)> + 1) * (1 + 10);
static_assert(KvFrame::kPayloadFieldNumber < 16, "its tag takes one byte");
// The tag and the length of the message around the fields.
constexpr size_t kMaxPrefixBytes = 1 + 10;

uint8_t* WriteFields(const FrameHeader& header, size_t payload_bytes, uint8_t* out) {
  std::apply([&](const auto&... field) { ((out = field.Write(header, out)), ...); }, kFields);
  out = CodedOutputStream::WriteTagToArray(kPayloadTag, out);
  return CodedOutputStream::WriteVarint64ToArray(payload_bytes, out);
}

struct PayloadPosition {
  size_t offset = 0;
  size_t size = 0;
};

// Protobuf's parsers of messages refuse longer tags and lengths. CodedInputStream takes them and
// drops the bits above 32.
constexpr int kMaxVarint32Bytes = 5;

// Reads a tag, 0 at the end.
bool ReadTag(CodedInputStream& in, uint32_t& tag) {
  const int begin = in.CurrentPosition();
  tag = in.ReadTag();
  return in.CurrentPosition() - begin <= kMaxVarint32Bytes;
}

bool ReadLength(CodedInputStream& in, int& length) {
  const int begin = in.CurrentPosition();
  return in.ReadVarintSizeAsInt(&length) && in.CurrentPosition() - begin <= kMaxVarint32Bytes;
}

bool ReadPayload(CodedInputStream& in, PayloadPosition& payload) {
  int length = 0;
  if (!ReadLength(in, length)) return false;
  payload = {static_cast<size_t>(in.CurrentPosition()), static_cast<size_t>(length)};
  return in.Skip(length);
}

// Skips a field that came with a later version. Groups, which are older than proto3, are refused.
bool SkipUnknown(CodedInputStream& in, uint32_t tag) {
  int length = 0;
  switch (WireFormatLite::GetTagWireType(tag)) {
    case WireFormatLite::WIRETYPE_LENGTH_DELIMITED:
      return WireFormatLite::GetTagFieldNumber(tag) != 0 && ReadLength(in, length) &&
             in.Skip(length);
    case WireFormatLite::WIRETYPE_START_GROUP:
      return false;
    default:
      return WireFormatLite::SkipField(&in, tag);
  }
}

bool ReadField(CodedInputStream& in, uint32_t tag, FrameHeader& header) {
  bool known = false;
  bool ok = true;
  const auto read_if_it_is = [&](const auto& field) {
    if (tag != field.tag()) return;
    known = true;
    ok = field.Read(in, header);
  };
  std::apply([&](const auto&... field) { (read_if_it_is(field), ...); }, kFields);
  return known ? ok : SkipUnknown(in, tag);
}

// Reads the fields of a KvFrame up to the stream's limit, noting where the payload lies.
bool ReadFields(CodedInputStream& in, FrameHeader& header, PayloadPosition& payload) {
  uint32_t tag = 0;
  while (ReadTag(in, tag)) {
    if (tag == 0) return in.ConsumedEntireMessage();
    if (!(tag == kPayloadTag ? ReadPayload(in, payload) : ReadField(in, tag, header))) return false;
  }
  return false;
}

absl::Status Malformed() { return absl::DataLossError("malformed message in the stream"); }

}  // namespace

uint64_t Checksum(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

grpc::ByteBuffer EncodeFrame(const FrameHeader& header, grpc::Slice payload) {
  uint8_t fields[kMaxFieldsBytes];
  const size_t fields_bytes = WriteFields(header, payload.size(), fields) - fields;

  uint8_t prefix[kMaxPrefixBytes];
  uint8_t* end = CodedOutputStream::WriteTagToArray(kKvFrameTag, prefix);
  end = CodedOutputStream::WriteVarint64ToArray(fields_bytes + payload.size(), end);

  const grpc::Slice slices[] = {grpc::Slice(prefix, end - prefix),
                                grpc::Slice(fields, fields_bytes), std::move(payload)};
  return grpc::ByteBuffer(slices, std::size(slices));
}

grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

FramePayload::FramePayload(std::vector<grpc::Slice> slices, size_t offset, size_t size)
    : slices_(std::move(slices)), size_(size) {
  for (const grpc::Slice& slice : slices_) {
    const size_t skipped = std::min(offset, slice.size());
    const size_t taken = std::min(size, slice.size() - skipped);
    if (taken > 0) pieces_.emplace_back(slice.begin() + skipped, taken);
    offset -= skipped;
    size -= taken;
  }
}

std::vector<absl::Span<const uint8_t>> FramePayload::Part(size_t offset, size_t size) const {
  std::vector<absl::Span<const uint8_t>> part;
  for (const auto& piece : pieces_) {
    const size_t skipped = std::min(offset, piece.size());
    const size_t taken = std::min(size, piece.size() - skipped);
    if (taken > 0) part.push_back(piece.subspan(skipped, taken));
    offset -= skipped;
    size -= taken;
  }
  return part;
}

uint64_t FramePayload::Checksum() const {
  if (pieces_.size() == 1) return wire::Checksum(pieces_[0].data(), pieces_[0].size());
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       XXH3_freeState);
  XXH3_64bits_reset(state.get());
  for (const auto& piece : pieces_) XXH3_64bits_update(state.get(), piece.data(), piece.size());
  return XXH3_64bits_digest(state.get());
}

void FramePayload::CopyTo(uint8_t* destination) const {
  for (const auto& piece : pieces_) {
    std::memcpy(destination, piece.data(), piece.size());
    destination += piece.size();
  }
}

const uint8_t* FramePayload::Contiguous(std::vector<uint8_t>& scratch) const {
  if (pieces_.size() == 1) return pieces_[0].data();
  scratch.resize(size_);
  CopyTo(scratch.data());
  return scratch.data();
}

absl::StatusOr<std::optional<ReceivedFrame>> ParseFrame(grpc::ByteBuffer& message) {
  ReceivedFrame frame;
  PayloadPosition payload;
  {
    grpc::ProtoBufferReader reader(&message);
    if (!reader.status().ok()) return Malformed();
    CodedInputStream in(&reader);
    uint32_t tag = 0;
    int size = 0;
    if (!ReadTag(in, tag) || tag != kKvFrameTag || !ReadLength(in, size)) return std::nullopt;
    // Anything beside the frame, be it a second one, is for the general parser.
    if (static_cast<size_t>(in.CurrentPosition()) + size != message.Length()) return std::nullopt;
    const CodedInputStream::Limit limit = in.PushLimit(size);
    if (!ReadFields(in, frame, payload)) return Malformed();
    in.PopLimit(limit);
  }
  std::vector<grpc::Slice> slices;
  if (!message.Dump(&slices).ok()) return Malformed();
  frame.payload = FramePayload(std::move(slices), payload.offset, payload.size);
  return frame;
}

absl::Status ParseMessage(grpc::ByteBuffer& bytes, google::protobuf::MessageLite& message) {
  grpc::ProtoBufferReader reader(&bytes);
  if (!reader.status().ok() || !message.ParseFromZeroCopyStream(&reader)) return Malformed();
  return absl::OkStatus();
}

ReceivedFrame MakeReceivedFrame(const KvFrame& frame) {
  ReceivedFrame result;
  std::apply([&](const auto&... field) { ((result.*field.member = (frame.*field.get)()), ...); },
             kFields);
  result.payload = FramePayload({grpc::Slice(frame.payload())}, 0, frame.payload().size());
  return result;
}

}  // namespace prefilld::wire
