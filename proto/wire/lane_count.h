// How many lanes a transfer has when nobody has said.
#ifndef PREFILLD_PROTO_WIRE_LANE_COUNT_H_
#define PREFILLD_PROTO_WIRE_LANE_COUNT_H_

#include <cstdint>

namespace prefilld::wire {

inline constexpr uint32_t kMaxLanes = 16;

// One lane carries 2 to 3 GB/s. KV of this size or more gets four lanes: between two processes of a
// host with 32 cores they carried 1.7 times as much at 6 MB and three times at 2 GB, at no more
// processor time a byte. Eight carried 13 to 32 % more than four, for twice the connections and
// threads. Smaller KV takes a few milliseconds anyhow.
inline constexpr uint64_t kBytesForManyLanes = uint64_t{8} << 20;
inline constexpr uint32_t kManyLanes = 4;

// Returns the number of lanes for so many bytes of KV; 0: nobody knows how many.
constexpr uint32_t ChooseLanes(uint64_t kv_bytes) {
  return kv_bytes < kBytesForManyLanes ? 1 : kManyLanes;
}

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_LANE_COUNT_H_
