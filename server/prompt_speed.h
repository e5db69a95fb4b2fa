// How fast prompts have been computed lately: what admission can tell a caller beforehand.
#ifndef PREFILLD_SERVER_PROMPT_SPEED_H_
#define PREFILLD_SERVER_PROMPT_SPEED_H_

#include <cstdint>
#include <deque>

#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "model/sparse/attention_policy.h"

namespace prefilld::server {

// Prompts computed alone and in batches are told apart: a batch gets through more tokens a second
// than any of its prompts would alone, and each of its prompts takes longer. Not thread-safe.
class PromptSpeed {
 public:
  // Of a prompt alone; `policy` is the one that was asked for, `compute` without waits for the
  // consumer.
  void Record(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy,
              absl::Duration compute);
  // Of several at once.
  void RecordBatch(absl::Time now, int64_t num_tokens, absl::Duration compute);

  // Tokens per second of the latest prompt or batch; 0: none yet.
  double latest() const { return latest_; }

  // The least time that such a prompt can be hoped to take: at the best speed of recent prompts
  // that were no longer and ran by the same policy. Longer prompts are slower per token, so this
  // errs on the short side. Zero while fewer than kMinSamples of them are known that are no older
  // than kMaxAge: what is refused for a speed that was never measured again would be refused for
  // good.
  absl::Duration AtBest(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy) const;
  // The least time that so many tokens of prompts that can be batched can be hoped to take: at the
  // best speed of recent batches of no fewer tokens, for larger ones are faster per token. Zero as
  // above.
  absl::Duration BatchedAtBest(absl::Time now, int64_t num_tokens) const;

  static constexpr int kMinSamples = 4;
  static constexpr absl::Duration kMaxAge = absl::Minutes(2);

 private:
  struct Sample {
    absl::Time at;
    int64_t num_tokens;
    model::AttentionPolicy policy;
    double tokens_per_second;
  };

  void Add(const Sample& sample, std::deque<Sample>& samples);
  static absl::Duration TimeAtBest(const std::deque<Sample>& samples, int64_t num_tokens,
                                   absl::FunctionRef<bool(const Sample&)> counts);

  std::deque<Sample> alone_, batches_;  // the latest last
  double latest_ = 0;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PROMPT_SPEED_H_
