// The requests that outlive their calls.
#ifndef PREFILLD_SERVER_RESUMABLE_JOBS_H_
#define PREFILLD_SERVER_RESUMABLE_JOBS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/clock.h"

namespace prefilld::server {

class PrefillJob;
class ResumptionMetrics;
class StagingRing;

// A resumable request has ended when its consumer says that it has everything or cancels, when its
// window or deadline passes, or when it fails. Nobody's call need be there at that moment, so this
// looks around for such requests and has them retired.
//
// It also bounds what those hold whose consumers are away: beyond kMaxWaiting of them, beyond
// kMaxWaitingOfTenant of one tenant, or beyond half of the staging memory, those that have waited
// for the shortest time are ended, and before them those whose result is out. The result of
// one that waits may have log-probabilities, at most 2 MiB. A push whose receiver is away counts as
// such a request; it ends with its call.
//
// Thread-safe.
class ResumableJobs {
 public:
  static constexpr size_t kMaxWaiting = 64;
  static constexpr size_t kMaxWaitingOfTenant = 32;

  // `on_over` is called once for each request, when it has ended and so has its control stream.
  // The others are borrowed.
  ResumableJobs(ResumptionMetrics& metrics, const Clock& clock, const StagingRing& ring,
                std::function<void(PrefillJob&)> on_over);

  // Takes in a request that was admitted. Must be called before its stream is attached.
  void Add(std::shared_ptr<PrefillJob> job);
  // Takes in a push, or a request that is pushed, which was admitted.
  void AddPush(std::shared_ptr<PrefillJob> push);

  // Must be called every few milliseconds, by one thread, until the last request is over.
  void LookAround();

 private:
  void BoundWaiting(const std::vector<std::shared_ptr<PrefillJob>>& jobs);

  ResumptionMetrics& metrics_;
  const Clock& clock_;
  const StagingRing& ring_;
  const std::function<void(PrefillJob&)> on_over_;

  absl::Mutex mu_;
  std::vector<std::shared_ptr<PrefillJob>> jobs_ ABSL_GUARDED_BY(mu_);
  std::vector<std::shared_ptr<PrefillJob>> pushes_ ABSL_GUARDED_BY(mu_);  // not in jobs_
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_RESUMABLE_JOBS_H_
