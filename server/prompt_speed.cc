#include "server/prompt_speed.h"

#include <algorithm>
#include <bit>

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

namespace {

// The weight of the newest layer: one odd measurement does not turn the order of prompts around,
// and a lasting change is believed after some ten layers.
constexpr double kWeight = 0.25;

int LengthClass(int64_t num_tokens) { return std::bit_width(static_cast<uint64_t>(num_tokens)); }

}  // namespace

void StepCost::Record(model::AttentionPolicy policy, int64_t num_tokens, absl::Duration layer) {
  if (num_tokens < 1) return;
  const absl::Duration per_token = layer / num_tokens;
  const auto [entry, is_first] =
      per_token_.try_emplace({policy, LengthClass(num_tokens)}, per_token);
  if (!is_first) entry->second += kWeight * (per_token - entry->second);
}

absl::Duration StepCost::Layer(model::AttentionPolicy policy, int64_t num_tokens) const {
  const Key key = {policy, LengthClass(num_tokens)};
  const auto above = per_token_.upper_bound(key);
  if (above != per_token_.begin()) {
    const auto at_or_below = std::prev(above);
    if (at_or_below->first.first == policy) return at_or_below->second * num_tokens;
  }
  const bool known = above != per_token_.end() && above->first.first == policy;
  return (known ? above->second : kUnmeasuredPerToken) * num_tokens;
}

}  // namespace prefilld::server
