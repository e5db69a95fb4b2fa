// Messages as the transport takes them.
//
// A KV frame's header is written by hand in front of its payload, so that the payload goes from
// the staging buffer to the socket without a copy; on the wire it is an ordinary protobuf message.
#ifndef PREFILLD_SERVER_FRAME_CODEC_H_
#define PREFILLD_SERVER_FRAME_CODEC_H_

#include <cstddef>
#include <cstdint>

#include <grpcpp/support/byte_buffer.h>

#include "server/staging_ring.h"

namespace google::protobuf {
class MessageLite;
}

namespace prefilld::server {

// The fields of prefill.v1.KvFrame other than payload.
struct FrameHeader {
  uint32_t lane = 0;
  uint64_t sequence = 0;
  uint32_t layer = 0;
  uint32_t first_block = 0;
  uint32_t num_blocks = 0;
  uint64_t checksum = 0;
  uint64_t sent_at_us = 0;
  uint32_t layers_computed = 0;
};

// XXH3, 64 bits, seed 0.
uint64_t Checksum(const void* data, size_t bytes);

// A PrefillEvent (and, byte for byte the same, a ReceiveRequest) that holds the frame. The message
// borrows the lease's first `payload_bytes` and gives the buffer back when the transport lets go.
grpc::ByteBuffer EncodeFrame(const FrameHeader& header, StagingRing::Lease payload,
                             size_t payload_bytes);

grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_FRAME_CODEC_H_
