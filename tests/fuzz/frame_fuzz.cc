// Fuzzes bytes as a KV stream might send them. The parser that leaves the payload where it lies
// must agree with Protobuf's own on every frame that it accepts.
//
// Input: one byte that says how many bytes a slice has (0: all of them), then the message.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <google/protobuf/stubs/logging.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include "prefill/v1/prefill.pb.h"
#include "proto/wire/frame_codec.h"
#include "tests/fuzz/require.h"

namespace prefilld::wire {
namespace {

using fuzz::Require;

grpc::ByteBuffer Cut(const uint8_t* data, size_t size, size_t slice_bytes) {
  std::vector<grpc::Slice> slices;
  for (size_t begin = 0; begin < size; begin += slice_bytes) {
    slices.emplace_back(data + begin, std::min(slice_bytes, size - begin));
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string Payload(const ReceivedFrame& frame) {
  std::vector<uint8_t> scratch;
  const uint8_t* bytes = frame.payload.Contiguous(scratch);
  return std::string(bytes, bytes + frame.payload.size());
}

void CompareWithProtobuf(const ReceivedFrame& frame, grpc::ByteBuffer& message) {
  ::prefill::v1::PrefillEvent event;
  Require(ParseMessage(message, event).ok(), "Protobuf reads what the frame parser reads");
  Require(event.has_kv_frame(), "what the frame parser reads is a frame");
  const ReceivedFrame expected = MakeReceivedFrame(event.kv_frame());
  Require(frame.lane == expected.lane && frame.sequence == expected.sequence &&
              frame.layer == expected.layer && frame.first_block == expected.first_block &&
              frame.num_blocks == expected.num_blocks && frame.checksum == expected.checksum &&
              frame.sent_at_us == expected.sent_at_us &&
              frame.layers_computed == expected.layers_computed,
          "both parsers read the same fields");
  const std::string payload = Payload(frame);
  Require(payload == event.kv_frame().payload(), "both parsers read the same payload");
  Require(frame.payload.Checksum() == Checksum(payload.data(), payload.size()),
          "the checksum does not depend on how the payload is cut");
}

}  // namespace
}  // namespace prefilld::wire

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld::wire;
  static const google::protobuf::LogSilencer silencer;  // of strings that are not UTF-8
  if (size < 2) return 0;
  grpc::ByteBuffer message = Cut(data + 1, size - 1, data[0] == 0 ? size : data[0]);
  const auto frame = ParseFrame(message);
  if (frame.ok() && frame->has_value()) {
    CompareWithProtobuf(**frame, message);
  } else if (frame.ok()) {
    ::prefill::v1::PrefillEvent event;
    (void)ParseMessage(message, event);
  }
  return 0;
}
