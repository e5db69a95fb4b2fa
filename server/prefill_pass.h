// One pass through the layers: jobs whose prompts are computed together and end one by one.
#ifndef PREFILLD_SERVER_PREFILL_PASS_H_
#define PREFILLD_SERVER_PREFILL_PASS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/prefill/prefill_engine.h"
#include "server/clock.h"
#include "server/kv_packer.h"
#include "server/prefill_job.h"

namespace prefilld::server {

class Metrics;

// The parts of the server that every pass works with; borrowed.
struct PassResources {
  KvPacker& packer;
  Metrics& metrics;
  Progress& progress;
  const Clock& clock;
  JobTimeouts timeouts;
};

// Returns how many layers of a prompt that is computed alone take as long as the others. Only the
// last query of the last layer is computed, unless log-probabilities are.
int WholeLayers(int num_layers, const PrefillWork& work);

// A pass is computed step by step: its layers, then the first tokens, then, part by part, the
// log-probabilities of each prompt that asked for them. Several passes may be under way, and their
// steps may come in any order.
//
// Each step first looks for jobs that have ended. The prompt of such a job is still computed with
// its batch, but nothing more is delivered for it; when all jobs have ended, the pass is over. A
// job gets its result as soon as the result is known, its last frame has left, and no other
// receiver of its prompt is awaited. A prompt that has other receivers has ended when they all
// have.
//
// Only the compute thread uses it.
class PrefillPass {
 public:
  enum class Next {
    kAnotherStep,
    kConsumers,  // Step can do nothing before the packer has more room, or a job's frames leave
    kOver,
  };
  struct StepReport {
    Next next = Next::kAnotherStep;
    // The time of the device for a layer. It is set by the step that computed a whole one: the
    // last layer is none where only the last query counts.
    std::optional<absl::Duration> layer;
    // The value of computing() at the first tokens. It is set by the step that computed them.
    std::optional<absl::Duration> first_tokens_after;
  };

  // Starts the jobs. Prompt i of the sequence belongs to jobs[i].
  PrefillPass(const PassResources& resources, std::vector<std::shared_ptr<PrefillJob>> jobs,
              std::unique_ptr<model::PrefillSequence> sequence, int num_layers);

  // Computes one layer, the first tokens, or one part of a prompt's log-probabilities, unless it
  // must wait for consumers. Once it has returned kOver, nobody uses the sequence. It fails when
  // the device failed; the caller must then abort the jobs that have not ended.
  //
  // It calls `at_point` at the points inside a long layer, where passes that may_interject() may
  // step. It stops there when all jobs have ended.
  //
  // If it may not compute, a step with something to compute does nothing and returns kConsumers.
  absl::StatusOr<StepReport> Step(
      absl::FunctionRef<void()> at_point = [] {}, bool may_compute = true);

  absl::Span<const std::shared_ptr<PrefillJob>> jobs() const { return jobs_; }
  int64_t num_tokens() const { return num_tokens_; }  // over all prompts
  int64_t num_computed_tokens() const { return num_tokens_ - sequence_->cached_tokens(); }
  bool AllEnded() const;
  // Tells whether the next step computes something. If not, it only sends results that have become
  // due, or ends the pass.
  bool uses_device() const { return !AllEnded() && HasWork(); }
  // Tells whether the next layer waits for slots that consumers hold.
  bool waits_for_room() const {
    return stalled_since_.has_value() && !source_->HasRoom().value_or(true);
  }
  bool may_interject() const { return sequence_->may_interject(); }
  int layers_computed() const { return layers_computed_; }
  // Returns the time that the device has computed for this pass: without waits, and without the
  // steps of other passes.
  absl::Duration computing() const { return absl::Microseconds(sequence_->device_us()); }
  // Predicts the time that it still computes, by the layers and the log-probabilities that have
  // been computed. `predicted_layer` is what a layer is expected to take; it counts as much as four
  // layers that were computed. The first layer does not count: it finds the algorithms for a length
  // that is new, and the heads that become pivots. A last layer of which only the last query counts
  // takes next to nothing. Log-probabilities are taken to last as long as a layer until there are
  // some.
  absl::Duration Remaining(absl::Duration predicted_layer) const;

 private:
  absl::StatusOr<StepReport> NextStep(absl::FunctionRef<void()> at_point, bool may_compute);
  bool HasWork() const {  // for the device
    return layers_computed_ < num_layers_ || !has_first_tokens_ || NextLogprobs().has_value();
  }
  // Returns the time of the layer if it is a whole one.
  absl::StatusOr<std::optional<absl::Duration>> ComputeLayer(absl::FunctionRef<void()> at_point);
  absl::Status ComputeFirstTokens();
  absl::Status ComputeLogprobs(size_t job);
  std::optional<size_t> NextLogprobs() const;  // the job whose turn it is
  int64_t LogprobsLeft(size_t job) const;      // which are still to be computed
  void EndStall();
  void CheckTimers();
  bool FinishWhatHasLeft();
  bool FinishIfLeft(size_t job, PrefillJob& receiver);

  const PassResources& resources_;
  const std::vector<std::shared_ptr<PrefillJob>> jobs_;
  const int num_layers_;
  int64_t num_tokens_ = 0;

  int layers_computed_ = 0;
  bool has_first_tokens_ = false;
  std::vector<bool> complete_;               // [jobs], all is computed that was asked for
  std::vector<int64_t> num_logprobs_;        // [jobs], computed so far
  absl::Duration layers_took_;               // on the device, all but the first
  absl::Duration logprobs_took_;             // on the device
  std::optional<absl::Time> stalled_since_;  // the next layer waits for a slot

  // The source borrows the sequence, so it is destroyed first.
  const std::unique_ptr<model::PrefillSequence> sequence_;
  const std::unique_ptr<KvPacker::Source> source_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PREFILL_PASS_H_
