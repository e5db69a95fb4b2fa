#include "server/prompt_speed.h"

#include <algorithm>

namespace prefilld::server {
namespace {

constexpr size_t kMaxSamples = 32;
// The time of a shorter prompt is mostly overhead and says nothing about longer ones.
constexpr int64_t kMinTokens = 1024;

double SpeedOf(int64_t num_tokens, absl::Duration compute) {
  return static_cast<double>(num_tokens) / absl::ToDoubleSeconds(compute);
}

}  // namespace

void PromptSpeed::Record(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy,
                         absl::Duration compute) {
  if (compute <= absl::ZeroDuration()) return;
  Add({now, num_tokens, policy, SpeedOf(num_tokens, compute)}, alone_);
}

void PromptSpeed::RecordBatch(absl::Time now, int64_t num_tokens, absl::Duration compute) {
  if (compute <= absl::ZeroDuration()) return;
  Add({now, num_tokens, model::AttentionPolicy::kDense, SpeedOf(num_tokens, compute)}, batches_);
}

void PromptSpeed::Add(const Sample& sample, std::deque<Sample>& samples) {
  latest_ = sample.tokens_per_second;
  samples.push_back(sample);
  if (samples.size() > kMaxSamples) samples.pop_front();
}

absl::Duration PromptSpeed::AtBest(absl::Time now, int64_t num_tokens,
                                   model::AttentionPolicy policy) const {
  return TimeAtBest(alone_, num_tokens, [&](const Sample& sample) {
    return sample.policy == policy && sample.num_tokens <= num_tokens && now - sample.at <= kMaxAge;
  });
}

absl::Duration PromptSpeed::BatchedAtBest(absl::Time now, int64_t num_tokens) const {
  return TimeAtBest(batches_, num_tokens, [&](const Sample& sample) {
    return sample.num_tokens >= num_tokens && now - sample.at <= kMaxAge;
  });
}

absl::Duration PromptSpeed::TimeAtBest(const std::deque<Sample>& samples, int64_t num_tokens,
                                       absl::FunctionRef<bool(const Sample&)> counts) {
  int known = 0;
  double best = 0;
  for (const Sample& sample : samples) {
    if (sample.num_tokens < kMinTokens || !counts(sample)) continue;
    ++known;
    best = std::max(best, sample.tokens_per_second);
  }
  if (known < kMinSamples) return absl::ZeroDuration();
  return absl::Seconds(static_cast<double>(num_tokens) / best);
}

}  // namespace prefilld::server
