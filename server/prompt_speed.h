// How fast prompts have been computed lately: what admission can tell a caller beforehand.
#ifndef PREFILLD_SERVER_PROMPT_SPEED_H_
#define PREFILLD_SERVER_PROMPT_SPEED_H_

#include <cstdint>
#include <deque>

#include "absl/time/time.h"
#include "model/attention_policy.h"

namespace prefilld::server {

// Not thread-safe.
class PromptSpeed {
 public:
  // `policy` is the one that was asked for, `compute` without waits for the consumer.
  void Record(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy,
              absl::Duration compute);

  // Tokens per second of the latest prompt; 0: none yet.
  double latest() const;

  // The least time that such a prompt can be hoped to take: at the best speed of recent prompts
  // that were no longer and ran by the same policy. Longer prompts are slower per token, so this
  // errs on the short side. Zero while fewer than kMinSamples of them are known that are no older
  // than kMaxAge: what is refused for a speed that was never measured again would be refused for
  // good.
  absl::Duration AtBest(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy) const;

  static constexpr int kMinSamples = 4;
  static constexpr absl::Duration kMaxAge = absl::Minutes(2);

 private:
  struct Sample {
    absl::Time at;
    int64_t num_tokens;
    model::AttentionPolicy policy;
    double tokens_per_second;
  };

  std::deque<Sample> samples_;  // the latest last
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PROMPT_SPEED_H_
