// Brings the calls of further receivers to the requests that they belong to.
#ifndef PREFILLD_SERVER_WAITING_RECEIVERS_H_
#define PREFILLD_SERVER_WAITING_RECEIVERS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/outcome.h"

namespace prefilld::server {

class PrefillJob;
class ResumableJobs;
class Scheduler;
class ServerStream;

// Receivers of one request are processes that start at the same moment, so one may call before the
// request is there. It waits for a moment then. Thread-safe.
class WaitingReceivers {
 public:
  // A receiver waits so long, as long as a request awaits its receivers.
  static constexpr absl::Duration kPatience = absl::Seconds(10);
  // So many may wait, and so many of one tenant where there are several; more are refused.
  static constexpr size_t kMaxWaiting = 256;
  static constexpr size_t kMaxWaitingOfTenant = kMaxWaiting / 4;

  WaitingReceivers(Scheduler& scheduler, ResumableJobs& resumable, const Clock& clock)
      : scheduler_(scheduler), resumable_(resumable), clock_(clock) {}

  // Takes a receiver to its request, now or as soon as that is there, and attaches its stream. The
  // stream may end, and be gone, at once. If the receiver is refused, it is ended with the reason.
  void Bring(std::shared_ptr<PrefillJob> receiver, ServerStream* stream);
  // Tries again for those that wait. Must be called every few milliseconds, until the last call has
  // ended.
  void Retry();
  // Ends those that wait for a request which was refused and show its key. An empty key is that of
  // a request without other receivers.
  void OnRefused(const std::string& request_id, const std::string& receiver_key, Outcome outcome,
                 const absl::Status& status);

 private:
  struct Waiting {
    std::shared_ptr<PrefillJob> receiver;
    ServerStream* stream;  // not attached yet
    absl::Time until;
  };

  bool TryToJoin(const Waiting& waiting);
  bool HasRoomFor(const PrefillJob& receiver) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<Waiting> TakeAll();
  void PutBack(std::vector<Waiting> waiting);

  Scheduler& scheduler_;
  ResumableJobs& resumable_;
  const Clock& clock_;

  absl::Mutex mu_;
  std::vector<Waiting> waiting_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_WAITING_RECEIVERS_H_
