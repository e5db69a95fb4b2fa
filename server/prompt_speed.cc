#include "server/prompt_speed.h"

#include <algorithm>

namespace prefilld::server {
namespace {

constexpr size_t kMaxSamples = 32;
// What is shorter takes overheads, not tokens, and says nothing about longer prompts.
constexpr int64_t kMinTokens = 1024;

}  // namespace

void PromptSpeed::Record(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy,
                         absl::Duration compute) {
  if (compute <= absl::ZeroDuration()) return;
  const double speed = static_cast<double>(num_tokens) / absl::ToDoubleSeconds(compute);
  samples_.push_back({now, num_tokens, policy, speed});
  if (samples_.size() > kMaxSamples) samples_.pop_front();
}

double PromptSpeed::latest() const {
  return samples_.empty() ? 0 : samples_.back().tokens_per_second;
}

absl::Duration PromptSpeed::AtBest(absl::Time now, int64_t num_tokens,
                                   model::AttentionPolicy policy) const {
  int known = 0;
  double best = 0;
  for (const Sample& sample : samples_) {
    if (sample.policy != policy || sample.num_tokens < kMinTokens ||
        sample.num_tokens > num_tokens || now - sample.at > kMaxAge) {
      continue;
    }
    ++known;
    best = std::max(best, sample.tokens_per_second);
  }
  if (known < kMinSamples) return absl::ZeroDuration();
  return absl::Seconds(static_cast<double>(num_tokens) / best);
}

}  // namespace prefilld::server
