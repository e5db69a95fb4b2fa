// The fields that describe a KV frame's payload. This header knows neither protobuf nor gRPC, so
// that frames can travel over any transport.
#ifndef PREFILLD_PROTO_WIRE_FRAME_HEADER_H_
#define PREFILLD_PROTO_WIRE_FRAME_HEADER_H_

#include <cstddef>
#include <cstdint>

namespace prefilld::wire {

// The fields of prefill.v1.KvFrame other than its payload; see there for their meaning.
struct FrameHeader {
  uint32_t lane = 0;
  uint64_t sequence = 0;
  uint32_t layer = 0;
  uint32_t first_block = 0;
  uint32_t num_blocks = 0;
  uint64_t checksum = 0;
  uint64_t sent_at_us = 0;
  uint32_t layers_computed = 0;
  uint64_t shared_offset = 0;
  uint32_t shared_bytes = 0;
};

// XXH3 with 64 bits and seed 0, as KvFrame.checksum has it.
uint64_t Checksum(const void* data, size_t bytes);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_FRAME_HEADER_H_
