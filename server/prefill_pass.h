// One pass through the layers: the jobs whose prompts are computed together, each with an end of
// its own.
#ifndef PREFILLD_SERVER_PREFILL_PASS_H_
#define PREFILLD_SERVER_PREFILL_PASS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/prefill/prefill_engine.h"
#include "server/clock.h"
#include "server/prefill_job.h"

namespace prefilld::server {

class KvStream;
class Metrics;
class PrefillPass;

// What every pass works with; borrowed.
struct PassResources {
  KvStream& stream;
  Metrics& metrics;
  const Clock& clock;
  const JobTimeouts timeouts;
  const int num_layers;
  const std::function<void()> on_progress;  // a step is done
  // The first tokens are known, in this time from the first layer, waits for consumers left out.
  const std::function<void(const PrefillPass&, absl::Duration)> on_first_tokens;
};

// Between two steps the ends of the jobs are looked for. One that has ended is computed on with the
// others and delivered no more; when all have, the pass stops. Each gets its result as soon as that
// is known and its last frame has left. For the compute thread.
class PrefillPass {
 public:
  // Prompt i of the sequence is that of jobs[i].
  PrefillPass(const PassResources& resources, std::vector<std::shared_ptr<PrefillJob>> jobs,
              model::PrefillSequence& sequence);

  // Not OK: the device failed, and jobs that have not ended are left to be aborted.
  absl::Status Run();

  absl::Span<const std::shared_ptr<PrefillJob>> jobs() const { return jobs_; }
  int64_t num_tokens() const { return num_tokens_; }  // of all prompts

 private:
  absl::Status Compute();
  absl::Status ComputeLayers();
  absl::Status ComputeFirstTokens();
  absl::Status ComputeLogprobs(size_t job);
  absl::Status WaitForSlot();
  bool AllEnded();  // now, by their timers
  void FinishWhatHasLeft();
  void Finish(size_t job);

  const PassResources& resources_;
  const std::vector<std::shared_ptr<PrefillJob>> jobs_;
  model::PrefillSequence& sequence_;
  int64_t num_tokens_ = 0;

  std::vector<bool> complete_;  // all is computed that was asked for
  std::vector<bool> finished_;
  absl::Duration stalled_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PREFILL_PASS_H_
