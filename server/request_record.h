// The measurements of one request, for its result, its log line and the metrics.
#ifndef PREFILLD_SERVER_REQUEST_RECORD_H_
#define PREFILLD_SERVER_REQUEST_RECORD_H_

#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/decode/sampling.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/attention_policy.h"
#include "model/sparse/layer_report.h"
#include "prefill/v1/prefill.pb.h"

namespace prefilld::server {

struct RequestStats {
  absl::Time accepted_at = absl::InfinitePast();
  std::optional<absl::Time> started_at;          // its first layer was about to compute
  std::optional<absl::Time> first_token_at;      // its first token was sampled
  std::optional<model::AttentionPolicy> policy;  // the one that ran
  int batch_prompts = 0;                         // computed together, this one included
  int64_t cached_tokens = 0;                     // that came from the prefix cache
  int layers_computed = 0;
  model::LayerReport total;                // sums over the layers; density is their mean by queries
  absl::Duration stalled;                  // time in which layers waited for the consumers
  std::optional<absl::Duration> logprobs;  // time of log-probabilities; absent: none computed
};

// Summarizes the recall of the heads with the given source; nullopt if there are none.
std::optional<model::RecallSummary> RecallOf(const std::vector<model::HeadRecall>& heads,
                                             model::PatternSource source);

// Thread-safe.
class RequestRecord {
 public:
  explicit RequestRecord(absl::Time accepted_at) { stats_.accepted_at = accepted_at; }

  void Start(absl::Time now, model::AttentionPolicy policy, int batch_prompts,
             int64_t cached_tokens);
  void AddLayer(const model::LayerReport& report);
  void AddStall(absl::Duration stalled);
  void SetFirstToken(absl::Time now, model::SampledToken token);
  // Takes the next part of the prompt's log-probabilities, and the time that it took.
  void AddLogprobs(const model::PromptLogprobs& part, absl::Duration took);

  // Takes over what another record knows of the computation: all but the log-probabilities and the
  // moment at which the request was accepted.
  void Follow(const RequestRecord& other);

  RequestStats stats() const;  // a snapshot
  // Makes the result as far as it is known here, with a report per layer if `layers` is set. The
  // log-probabilities are moved out, so call it once.
  ::prefill::v1::PrefillResult TakeResult(bool layers);

 private:
  mutable absl::Mutex mu_;
  RequestStats stats_ ABSL_GUARDED_BY(mu_);
  std::vector<model::LayerReport> layers_ ABSL_GUARDED_BY(mu_);
  double density_times_queries_ ABSL_GUARDED_BY(mu_) = 0.0;  // over the layers
  model::SampledToken first_token_ ABSL_GUARDED_BY(mu_);
  model::PromptLogprobs logprobs_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_REQUEST_RECORD_H_
