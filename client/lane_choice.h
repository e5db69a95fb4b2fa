// How many lanes a request asks for when nobody has said.
#ifndef PREFILLD_CLIENT_LANE_CHOICE_H_
#define PREFILLD_CLIENT_LANE_CHOICE_H_

#include <cstdint>
#include <string>

#include "prefill/v1/kv.pb.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/lane_count.h"

namespace prefilld::client {

using wire::ChooseLanes;
using wire::kBytesForManyLanes;
using wire::kManyLanes;
using wire::kMaxLanes;

// Return the bytes of KV that a token has, over all layers: at a server that is asked for that
// layout, 0 if no model is so or the server would refuse it; or in a transfer, whose layout has
// been checked (CheckLayout).
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
