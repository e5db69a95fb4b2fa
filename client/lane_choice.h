// How many lanes a request asks for when nobody has said.
#ifndef PREFILLD_CLIENT_LANE_CHOICE_H_
#define PREFILLD_CLIENT_LANE_CHOICE_H_

#include <cstdint>
#include <string>

#include "prefill/v1/kv.pb.h"
#include "prefill/v1/prefill.pb.h"

namespace prefilld::client {

inline constexpr uint32_t kMaxLanes = 16;

// One lane carries 2 to 3 GB/s. KV of this size or more gets four lanes: between two processes of a
// host with 32 cores they carried 1.7 times as much at 6 MB and three times at 2 GB, at no more
// processor time a byte. Eight carried 13 to 32 % more than four, for twice the connections and
// threads. Smaller KV takes a few milliseconds anyhow.
inline constexpr uint64_t kBytesForManyLanes = uint64_t{8} << 20;
inline constexpr uint32_t kManyLanes = 4;

// Returns the number of lanes for so many bytes of KV; 0: nobody knows how many.
uint32_t ChooseLanes(uint64_t kv_bytes);

// Return the bytes of KV that a token has, over all layers: at a server that is asked for that
// layout, or in a transfer.
uint64_t KvBytesPerToken(const ::prefill::v1::ServerInfo& server,
                         const ::prefill::v1::KvLayoutRequest& wish);
uint64_t KvBytesPerToken(const ::prefill::v1::KvLayout& layout);

// Returns the tokens of a prompt whose KV comes: without the blocks that its consumer has.
uint64_t TokensToCome(const ::prefill::v1::KvLayoutRequest& wish, uint64_t num_tokens);

// Tells whether the address is a name that stands for more than one machine, so that connections
// to it may end at different servers. It may ask a name server and wait for it.
bool StandsForSeveral(const std::string& address);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_LANE_CHOICE_H_
