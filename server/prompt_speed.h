// The speed at which prompts were computed lately: whole prompts, from which admission predicts
// times, and single layers, from which the order of turns is made.
#ifndef PREFILLD_SERVER_PROMPT_SPEED_H_
#define PREFILLD_SERVER_PROMPT_SPEED_H_

#include <cstdint>
#include <deque>
#include <map>

#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/attention_policy.h"

namespace prefilld::server {

// Keeps prompts computed alone apart from batches: a batch computes more tokens a second than any
// of its prompts would alone, but each of its prompts takes longer. Not thread-safe.
class PromptSpeed {
 public:
  // Records a prompt that was computed alone. `policy` is the one that was asked for; `compute` is
  // the time from its first layer to its first token, without waits for the consumer.
  void Record(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy,
              absl::Duration compute);
  // Records what such a prompt is expected to take. It counts as much as kMinSamples prompts.
  void Expect(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy,
              absl::Duration compute);
  // Records a batch with `num_tokens` over all of its prompts.
  void RecordBatch(absl::Time now, int64_t num_tokens, absl::Duration compute);

  // Tokens per second of the latest prompt or batch; 0: none yet.
  double latest() const { return latest_; }

  // Returns a lower bound for the time that such a prompt takes alone, by the best speed among the
  // samples that count: prompts of the same policy that were no longer, measured within kMaxAge.
  // Longer prompts are slower per token, so the bound errs on the short side.
  //
  // Zero means unknown: fewer than kMinSamples samples count. Samples expire because prompts that
  // are refused for their speed are not measured, and would otherwise be refused forever.
  absl::Duration AtBest(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy) const;
  // Returns the same bound for `num_tokens` of prompts that are batched. Larger batches are faster
  // per token, so the samples that count are batches of at least as many tokens.
  absl::Duration BatchedAtBest(absl::Time now, int64_t num_tokens) const;

  static constexpr int kMinSamples = 4;
  static constexpr absl::Duration kMaxAge = absl::Minutes(2);

 private:
  struct Sample {
    absl::Time at;
    int64_t num_tokens;
    model::AttentionPolicy policy;
    double tokens_per_second;
    int prompts = 1;  // that it counts for
  };

  void Add(const Sample& sample, std::deque<Sample>& samples);
  static absl::Duration TimeAtBest(const std::deque<Sample>& samples, int64_t num_tokens,
                                   absl::FunctionRef<bool(const Sample&)> counts);

  std::deque<Sample> alone_, batches_;  // the latest last
  double latest_ = 0;
};

// The scheduler compares prompts by the time that they still need. This class predicts it for
// prompts that have not computed a layer yet. It remembers the time per token of each policy, apart
// for each doubling of the length, because attention makes long prompts slower per token and sparse
// policies change by how much. Between lengths it goes by a straight line: token by token work
// takes a constant time per token, and attention one that grows with the length. Not thread-safe.
class StepCost {
 public:
  // Records a layer of `num_tokens` tokens. `policy` is the one that was asked for.
  void Record(model::AttentionPolicy policy, int64_t num_tokens, absl::Duration layer);

  // Tells whether a layer of the policy was recorded.
  bool Knows(model::AttentionPolicy policy) const { return measured_.contains(policy); }

  // Predicts a layer. The time per token is interpolated between the nearest measured lengths.
  // Above all of them it goes on to grow as it does from half of the greatest one, or less, to
  // that; below all of them it is that of the least. Before anything of the policy was measured,
  // the prediction is kUnmeasuredPerToken a token, which at least orders prompts by length.
  absl::Duration Layer(model::AttentionPolicy policy, int64_t num_tokens) const;

  // Predicts a layer of `num_tokens` tokens behind `num_cached` others, whose keys they see, too:
  // it takes what a layer of all takes, without what one of the cached tokens would have taken.
  absl::Duration LayerBehind(model::AttentionPolicy policy, int64_t num_cached,
                             int64_t num_tokens) const;

  static constexpr absl::Duration kUnmeasuredPerToken = absl::Microseconds(1);

 private:
  // The means of the layers of one length class, the latest counting most.
  struct Measured {
    double num_tokens = 0.0;
    absl::Duration per_token;
  };
  using Lengths = std::map<int, Measured>;  // by the length's number of bits

  std::map<model::AttentionPolicy, Lengths> measured_;
};

// Tells both what the engine measured when it was created, so that the first prompts are ordered
// and admitted by times, too. For policy auto the times count of the policy that it resolves to.
void RecordMeasuredAtStart(const model::EngineInfo& engine, absl::Time now, StepCost& costs,
                           PromptSpeed& speed);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PROMPT_SPEED_H_
