// KV frames as they come off the wire, without copying their payload.
#ifndef PREFILLD_CLIENT_RECEIVED_FRAME_H_
#define PREFILLD_CLIENT_RECEIVED_FRAME_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "google/protobuf/message_lite.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "prefill/v1/kv.pb.h"

namespace prefilld::client {

// The bytes of one frame, in the pieces in which they arrived. Keeps them alive.
class FramePayload {
 public:
  FramePayload() = default;
  // The `size` bytes from `offset` on of the slices in a row; they must be there.
  FramePayload(std::vector<grpc::Slice> slices, size_t offset, size_t size);

  size_t size() const { return size_; }
  absl::Span<const absl::Span<const uint8_t>> pieces() const { return pieces_; }
  uint64_t Xxh3() const;
  void CopyTo(uint8_t* destination) const;
  // The payload itself when it arrived in one piece, else a copy of it in `scratch`. Valid while
  // both live.
  const uint8_t* Contiguous(std::vector<uint8_t>& scratch) const;

 private:
  std::vector<grpc::Slice> slices_;
  std::vector<absl::Span<const uint8_t>> pieces_;
  size_t size_ = 0;
};

// prefill.v1.KvFrame; see there for the fields.
struct ReceivedFrame {
  uint32_t lane = 0;
  uint64_t sequence = 0;
  uint32_t layer = 0;
  uint32_t first_block = 0;
  uint32_t num_blocks = 0;
  uint64_t checksum = 0;
  uint64_t sent_at_us = 0;
  uint32_t layers_computed = 0;
  FramePayload payload;
};

// The frame in a PrefillEvent or a ReceiveRequest (they number the field alike); nullopt when the
// message is something else, or a frame in an unusual encoding: decode those with ParseMessage and
// MakeReceivedFrame. DATA_LOSS when the bytes are no protobuf message.
absl::StatusOr<std::optional<ReceivedFrame>> ParseFrame(grpc::ByteBuffer& message);

// DATA_LOSS when the bytes are no such message.
absl::Status ParseMessage(grpc::ByteBuffer& bytes, google::protobuf::MessageLite& message);

// Copies the payload.
ReceivedFrame MakeReceivedFrame(const ::prefill::v1::KvFrame& frame);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_RECEIVED_FRAME_H_
