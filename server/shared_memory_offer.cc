#include "server/shared_memory_offer.h"

#include <algorithm>
#include <utility>

#include "proto/wire/kv_layout.h"
#include "proto/wire/packet_socket.h"
#include "server/prefill_work.h"

namespace prefilld::server {
namespace {

// There are enough buffers for some to be packed, some on their way and some being read on every
// lane.
constexpr int64_t kBuffersPerLane = 4, kBuffersBeside = 4;

// Returns the number of frames of a request, none of which is larger than a buffer.
int64_t NumFrames(const PrefillWork& work, int64_t buffer_bytes) {
  const int64_t blocks_per_frame =
      std::max<int64_t>(1, buffer_bytes / wire::KvPairBytes(work.layout));
  return work.layout.num_layers() *
         ((work.num_sent_blocks() + blocks_per_frame - 1) / blocks_per_frame);
}

}  // namespace

int64_t UsefulSharedBytes(int64_t buffer_bytes, int num_lanes) {
  return buffer_bytes * (kBuffersPerLane * num_lanes + kBuffersBeside);
}

// Only who takes frames on the streams of the call itself can take them from memory.
::prefill::v1::SharedMemoryOffer OfferSharedMemory(const SharedMemoryTerms& terms,
                                                   const PrefillWork& work, std::string new_key) {
  ::prefill::v1::SharedMemoryOffer offer;
  if (terms.sockets.empty() || !work.takes_kv || work.pushes() ||
      work.kv_bytes() < kLeastSharedKvBytes) {
    return offer;
  }
  const auto buffer_bytes = static_cast<int64_t>(terms.buffer_bytes);
  for (const std::string& socket : terms.sockets) offer.add_sockets(socket);
  offer.set_key(std::move(new_key));
  offer.set_network(wire::NetworkOfThisProcess());
  offer.set_bytes(static_cast<uint64_t>(std::min(UsefulSharedBytes(buffer_bytes, work.num_lanes),
                                                 NumFrames(work, buffer_bytes) * buffer_bytes)));
  return offer;
}

}  // namespace prefilld::server
