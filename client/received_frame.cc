#include "client/received_frame.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "xxhash.h"

namespace prefilld::client {
namespace {

using ::google::protobuf::internal::WireFormatLite;
using ::google::protobuf::io::CodedInputStream;
using ::prefill::v1::KvFrame;

constexpr uint32_t kFrameTag =
    WireFormatLite::MakeTag(3, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);

constexpr uint32_t VarintTag(int field) {
  return WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_VARINT);
}

absl::Status Malformed() { return absl::DataLossError("malformed message in the stream"); }

struct PayloadPosition {
  size_t offset = 0;
  size_t size = 0;
};

// Reads the fields of a KvFrame up to the stream's limit, noting where the payload lies.
bool ParseFrameFields(CodedInputStream& in, ReceivedFrame& frame, PayloadPosition& payload) {
  while (const uint32_t tag = in.ReadTag()) {
    bool ok;
    switch (tag) {
      case VarintTag(KvFrame::kLaneFieldNumber):
        ok = in.ReadVarint32(&frame.lane);
        break;
      case VarintTag(KvFrame::kSequenceFieldNumber):
        ok = in.ReadVarint64(&frame.sequence);
        break;
      case VarintTag(KvFrame::kLayerFieldNumber):
        ok = in.ReadVarint32(&frame.layer);
        break;
      case VarintTag(KvFrame::kFirstBlockFieldNumber):
        ok = in.ReadVarint32(&frame.first_block);
        break;
      case VarintTag(KvFrame::kNumBlocksFieldNumber):
        ok = in.ReadVarint32(&frame.num_blocks);
        break;
      case WireFormatLite::MakeTag(KvFrame::kChecksumFieldNumber, WireFormatLite::WIRETYPE_FIXED64):
        ok = in.ReadLittleEndian64(&frame.checksum);
        break;
      case VarintTag(KvFrame::kSentAtUsFieldNumber):
        ok = in.ReadVarint64(&frame.sent_at_us);
        break;
      case VarintTag(KvFrame::kLayersComputedFieldNumber):
        ok = in.ReadVarint32(&frame.layers_computed);
        break;
      case WireFormatLite::MakeTag(KvFrame::kPayloadFieldNumber,
                                   WireFormatLite::WIRETYPE_LENGTH_DELIMITED): {
        uint32_t size;
        ok = in.ReadVarint32(&size);
        payload = {static_cast<size_t>(in.CurrentPosition()), size};
        ok = ok && in.Skip(static_cast<int>(size));
        break;
      }
      default:
        ok = WireFormatLite::SkipField(&in, tag);
    }
    if (!ok) return false;
  }
  return in.ConsumedEntireMessage();
}

}  // namespace

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

uint64_t FramePayload::Xxh3() const {
  if (pieces_.size() == 1) return XXH3_64bits(pieces_[0].data(), pieces_[0].size());
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
    uint32_t size;
    if (in.ReadTag() != kFrameTag || !in.ReadVarint32(&size)) return std::nullopt;
    // Anything beside the frame, be it a second one, is for the general parser.
    if (in.CurrentPosition() + size_t{size} != message.Length()) return std::nullopt;
    const CodedInputStream::Limit limit = in.PushLimit(static_cast<int>(size));
    if (!ParseFrameFields(in, frame, payload)) return Malformed();
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
  result.lane = frame.lane();
  result.sequence = frame.sequence();
  result.layer = frame.layer();
  result.first_block = frame.first_block();
  result.num_blocks = frame.num_blocks();
  result.checksum = frame.checksum();
  result.sent_at_us = frame.sent_at_us();
  result.layers_computed = frame.layers_computed();
  result.payload = FramePayload({grpc::Slice(frame.payload())}, 0, frame.payload().size());
  return result;
}

}  // namespace prefilld::client
