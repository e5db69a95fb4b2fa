#include "server/prompt_speed.h"

#include <algorithm>
#include <bit>
#include <utility>

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

void PromptSpeed::Expect(absl::Time now, int64_t num_tokens, model::AttentionPolicy policy,
                         absl::Duration compute) {
  if (compute <= absl::ZeroDuration()) return;
  Add({now, num_tokens, policy, SpeedOf(num_tokens, compute), kMinSamples}, alone_);
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
    known += sample.prompts;
    best = std::max(best, sample.tokens_per_second);
  }
  if (known < kMinSamples) return absl::ZeroDuration();
  return absl::Seconds(static_cast<double>(num_tokens) / best);
}

namespace {

// The weight of the newest layer: one odd measurement does not turn the order of prompts around,
// and a lasting change is believed after some ten layers.
constexpr double kWeight = 0.25;

int PromptLengthClass(int64_t num_tokens) {
  return std::bit_width(static_cast<uint64_t>(num_tokens));
}

}  // namespace

void StepCost::Record(model::AttentionPolicy policy, int64_t num_tokens, absl::Duration layer) {
  if (num_tokens < 1) return;
  const Measured latest = {static_cast<double>(num_tokens), layer / num_tokens};
  const auto [entry, is_first] =
      measured_[policy].try_emplace(PromptLengthClass(num_tokens), latest);
  if (is_first) return;
  Measured& mean = entry->second;
  mean.num_tokens += kWeight * (latest.num_tokens - mean.num_tokens);
  mean.per_token += kWeight * (latest.per_token - mean.per_token);
}

absl::Duration StepCost::Layer(model::AttentionPolicy policy, int64_t num_tokens) const {
  const auto of_policy = measured_.find(policy);
  if (of_policy == measured_.end()) return kUnmeasuredPerToken * num_tokens;
  const Lengths& lengths = of_policy->second;
  const auto length = static_cast<double>(num_tokens);
  const Measured* shorter = nullptr;  // of the two lengths that a line goes through
  const Measured* longer = nullptr;
  for (const auto& [length_class, measured] : lengths) {
    if (longer != nullptr && longer->num_tokens >= length) break;
    shorter = std::exchange(longer, &measured);
  }
  absl::Duration per_token = longer->per_token;
  if (longer->num_tokens < length) {
    shorter = nullptr;  // lengths that lie near to each other say little about greater ones
    for (const auto& [length_class, measured] : lengths) {
      if (2 * measured.num_tokens <= longer->num_tokens) shorter = &measured;
    }
  }
  if (shorter != nullptr) {
    const absl::Duration growth = longer->per_token - shorter->per_token;
    const double way = (length - longer->num_tokens) / (longer->num_tokens - shorter->num_tokens);
    if (way <= 0.0 || growth > absl::ZeroDuration()) per_token += way * growth;
  }
  return per_token * length;
}

absl::Duration StepCost::LayerBehind(model::AttentionPolicy policy, int64_t num_cached,
                                     int64_t num_tokens) const {
  const absl::Duration own = Layer(policy, num_tokens);
  if (num_cached == 0) return own;
  return std::max(own, Layer(policy, num_cached + num_tokens) - Layer(policy, num_cached));
}

void RecordMeasuredAtStart(const model::EngineInfo& engine, absl::Time now, StepCost& costs,
                           PromptSpeed& speed) {
  for (const model::LayerTime& measured : engine.layer_times) {
    const absl::Duration layer = absl::Microseconds(measured.us);
    const auto record = [&](model::AttentionPolicy policy) {
      costs.Record(policy, measured.num_tokens, layer);
      speed.Expect(now, measured.num_tokens, policy, engine.config.num_layers * layer);
    };
    record(measured.policy);
    const bool shares = measured.num_tokens >= engine.default_attention.crossover_tokens;
    const bool is_that_of_auto = shares == (measured.policy == model::AttentionPolicy::kShare);
    if (is_that_of_auto) record(model::AttentionPolicy::kAuto);
  }
}

}  // namespace prefilld::server
