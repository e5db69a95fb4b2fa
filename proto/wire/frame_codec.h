// Converts KV frames to messages and back without a copy of their payload.
//
// A PrefillEvent and a ReceiveRequest number their frame alike, so that one encoding serves the
// response stream of a call and the request stream of a push. A frame's fields are written by hand
// in front of its payload, and read by hand up to it. On the wire it is an ordinary protobuf
// message.
#ifndef PREFILLD_PROTO_WIRE_FRAME_CODEC_H_
#define PREFILLD_PROTO_WIRE_FRAME_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "prefill/v1/kv.pb.h"
#include "proto/wire/frame_header.h"

namespace prefilld::wire {

// Encodes a frame as a PrefillEvent, whose bytes are those of the ReceiveRequest with the same
// frame. The message refers to the payload's memory and releases the slice when the transport lets
// go of the message.
grpc::ByteBuffer EncodeFrame(const FrameHeader& header, grpc::Slice payload);

grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message);

// The payload of a received frame, in the pieces in which it arrived. It keeps them alive.
class FramePayload {
 public:
  FramePayload() = default;
  // The payload is the `size` bytes from `offset` on in the sequence of slices, which must have
  // that many.
  FramePayload(std::vector<grpc::Slice> slices, size_t offset, size_t size);

  size_t size() const { return size_; }
  absl::Span<const absl::Span<const uint8_t>> pieces() const { return pieces_; }
  // Returns the pieces of the `size` bytes from `offset` on, which must be there.
  std::vector<absl::Span<const uint8_t>> Part(size_t offset, size_t size) const;
  uint64_t Checksum() const;
  void CopyTo(uint8_t* destination) const;
  // Returns the payload itself if it arrived in one piece, otherwise a copy of it in `scratch`. The
  // result is valid while this and `scratch` live.
  const uint8_t* Contiguous(std::vector<uint8_t>& scratch) const;

 private:
  std::vector<grpc::Slice> slices_;
  std::vector<absl::Span<const uint8_t>> pieces_;
  size_t size_ = 0;
};

struct ReceivedFrame : FrameHeader {
  FramePayload payload;
};

// Parses the frame in a PrefillEvent or a ReceiveRequest. Returns nullopt when the message is
// something else, or holds a frame in an unusual encoding, which ParseMessage and MakeReceivedFrame
// can read. DATA_LOSS when the bytes are no protobuf message.
absl::StatusOr<std::optional<ReceivedFrame>> ParseFrame(grpc::ByteBuffer& message);

// Parses any message. DATA_LOSS when the bytes are no such message.
absl::Status ParseMessage(grpc::ByteBuffer& bytes, google::protobuf::MessageLite& message);

// Makes a received frame from a parsed one, copying its payload.
ReceivedFrame MakeReceivedFrame(const ::prefill::v1::KvFrame& frame);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_FRAME_CODEC_H_
