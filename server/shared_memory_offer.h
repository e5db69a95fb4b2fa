// The rules by which requests are offered shared memory, and how much of it they can use.
#ifndef PREFILLD_SERVER_SHARED_MEMORY_OFFER_H_
#define PREFILLD_SERVER_SHARED_MEMORY_OFFER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "prefill/v1/shared_memory.pb.h"

namespace prefilld::server {

struct PrefillWork;

// Less KV than this is copied by gRPC in a few milliseconds, in which a new memory would not be
// attached yet: on a GPU it takes 2 to 9 ms to pin it. It is also the size from which clients use
// several lanes.
inline constexpr int64_t kLeastSharedKvBytes = int64_t{8} << 20;

// The part of all offers of a server that is the same.
struct SharedMemoryTerms {
  std::vector<std::string> sockets;  // empty: there is no shared memory
  size_t buffer_bytes = 0;           // that a frame takes there
};

// Returns the bytes that a request with so many lanes can use at most.
int64_t UsefulSharedBytes(int64_t buffer_bytes, int num_lanes);

// Returns the offer for a request; its key is empty if there is none. `new_key` is what the
// consumer will have to show.
::prefill::v1::SharedMemoryOffer OfferSharedMemory(const SharedMemoryTerms& terms,
                                                   const PrefillWork& work, std::string new_key);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_MEMORY_OFFER_H_
