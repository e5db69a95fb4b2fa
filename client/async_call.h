#ifndef PREFILLD_CLIENT_ASYNC_CALL_H_
#define PREFILLD_CLIENT_ASYNC_CALL_H_

#include <memory>

#include "client/prefill_client.h"

namespace grpc {
class Channel;
}

namespace prefilld::client {

// The path of the method, as gRPC's generic stubs want it.
inline constexpr char kPrefillMethod[] = "/prefill.v1.PrefillService/Prefill";

// Starts a Prefill call on one lane that nobody waits for, as PrefillClient::Start says. The sink
// is borrowed until `done` is called.
std::shared_ptr<StartedPrefill> StartAsyncCall(const std::shared_ptr<grpc::Channel>& channel,
                                               const ::prefill::v1::PrefillRequest& request,
                                               KvSink& sink, const PrefillCallOptions& options,
                                               PrefillDone done);

// Returns how a stream has ended for its caller. A cancel that did not come from the caller comes
// from a server that shuts down.
absl::Status EndOfStream(absl::Status status);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_ASYNC_CALL_H_
