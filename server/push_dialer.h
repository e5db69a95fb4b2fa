// Pushes the KV of requests to decode workers that prefilld calls.
#ifndef PREFILLD_SERVER_PUSH_DIALER_H_
#define PREFILLD_SERVER_PUSH_DIALER_H_

#include <cstdint>
#include <functional>
#include <memory>

#include <grpcpp/security/credentials.h>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/prefill_job.h"
#include "server/receiver_lookup.h"

namespace prefilld::server {

class ResumptionMetrics;

// Opens the calls to receivers, and must outlive them. Thread-safe.
class PushDialer {
 public:
  // All references are borrowed. A receiver that takes nothing for `stall_timeout` is ended by its
  // job, not by the connection.
  PushDialer(std::shared_ptr<grpc::ChannelCredentials> credentials, bool use_proxy,
             const Clock& clock, absl::Duration stall_timeout, ResumptionMetrics& metrics);

  // Begins to push to work().deliver_to: opens a call for each lane of the job, and another one
  // when it breaks (PushTransfer). The job ends with the receiver's status if the receiver refuses,
  // fails or stays away. A further receiver has no calls but these, so it ends well with them too.
  // `on_done` is called when the last call is over; may be null.
  void Start(std::shared_ptr<PrefillJob> job, std::function<void()> on_done = nullptr);

  // Waits until every call is over and its channel is gone. Must be called while the gRPC server
  // still exists. gRPC's callback threads are joined by whoever is the last to use them, and that
  // must not be a channel, which may go on one of these very threads.
  void AwaitIdle();

 private:
  friend class PushTransfer;
  // Counts the lanes that have a call, or will have one. Transfers own it together, because the
  // last one leaves while AwaitIdle returns.
  struct Open {
    absl::Mutex mu;
    int64_t lanes ABSL_GUARDED_BY(mu) = 0;
  };

  const std::shared_ptr<grpc::ChannelCredentials> credentials_;
  const bool use_proxy_;
  const Clock& clock_;
  const absl::Duration patience_;
  ResumptionMetrics& metrics_;
  ReceiverLookup lookup_;
  const std::shared_ptr<Open> open_ = std::make_shared<Open>();
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PUSH_DIALER_H_
