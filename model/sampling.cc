#include "model/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace prefilld::model {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014): one step per argument makes a counter-based generator.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Uniform in [0, 1), a pure function of its arguments.
double Uniform(uint64_t seed, int64_t position) {
  return static_cast<double>(Mix(Mix(seed) ^ static_cast<uint64_t>(position)) >> 11) * 0x1p-53;
}

// Ids of the `count` largest logits, descending, lowest id first among equals. Logits that are
// not numbers rank last.
std::vector<uint32_t> Largest(absl::Span<const float> logits, size_t count) {
  std::vector<uint32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0u);
  count = std::min(count, ids.size());
  const auto rank = [&](uint32_t id) { return std::isnan(logits[id]) ? -INFINITY : logits[id]; };
  std::partial_sort(ids.begin(), ids.begin() + count, ids.end(), [&](uint32_t a, uint32_t b) {
    return rank(a) != rank(b) ? rank(a) > rank(b) : a < b;
  });
  ids.resize(count);
  return ids;
}

// log(sum(exp(logits))) over the finite ones.
double LogSumExp(absl::Span<const float> logits, double largest) {
  double sum = 0.0;
  for (float logit : logits) {
    if (std::isfinite(logit)) sum += std::exp(logit - largest);
  }
  return largest + std::log(sum);
}

uint32_t Draw(absl::Span<const float> logits, const SamplingOptions& options, int64_t position) {
  const size_t keep = options.top_k > 0 ? options.top_k : logits.size();
  std::vector<uint32_t> ids = Largest(logits, keep);
  std::vector<double> weights;
  weights.reserve(ids.size());
  const double largest = logits[ids.front()];
  for (uint32_t id : ids) {
    const double scaled = (logits[id] - largest) / options.temperature;
    weights.push_back(std::isfinite(logits[id]) ? std::exp(scaled) : 0.0);
  }
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  if (options.top_p > 0.0f && options.top_p < 1.0f) {
    double kept = 0.0;
    size_t count = 0;
    while (count < weights.size() && kept < options.top_p * total) kept += weights[count++];
    weights.resize(count);
    total = kept;
  }
  double left = Uniform(options.seed, position) * total;
  for (size_t i = 0; i < weights.size(); ++i) {
    left -= weights[i];
    if (left < 0.0) return ids[i];
  }
  return ids.front();  // rounding left a remainder
}

}  // namespace

absl::Status Validate(const SamplingOptions& options) {
  if (!(options.temperature >= 0.0f && options.temperature <= kMaxTemperature)) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.temperature ", options.temperature,
                                                   " is outside [0, ", kMaxTemperature, "]"));
  }
  if (!(options.top_p >= 0.0f && options.top_p <= 1.0f)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling.top_p ", options.top_p, " is outside [0, 1]"));
  }
  if (options.top_logprobs > kMaxTopLogprobs) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.top_logprobs ", options.top_logprobs,
                                                   " is above the limit of ", kMaxTopLogprobs));
  }
  return absl::OkStatus();
}

absl::StatusOr<SampledToken> Sample(absl::Span<const float> logits, const SamplingOptions& options,
                                    int64_t position) {
  const auto finite = [](float logit) { return std::isfinite(logit); };
  if (std::none_of(logits.begin(), logits.end(), finite)) {
    return absl::InternalError(
        absl::StrCat("none of ", logits.size(), " logits at position ", position, " is finite"));
  }
  const std::vector<uint32_t> top = Largest(logits, std::max(options.top_logprobs, 1u));
  if (!std::isfinite(logits[top.front()])) {
    return absl::InternalError(absl::StrCat("the logit of token ", top.front(), " at position ",
                                            position, " is infinite"));
  }
  const double normalizer = LogSumExp(logits, logits[top.front()]);
  const auto logprob = [&](uint32_t id) { return static_cast<float>(logits[id] - normalizer); };

  SampledToken token;
  token.token_id = options.temperature > 0.0f ? Draw(logits, options, position) : top.front();
  token.logprob = logprob(token.token_id);
  for (size_t i = 0; i < std::min<size_t>(options.top_logprobs, top.size()); ++i) {
    token.top_logprobs.emplace_back(top[i], logprob(top[i]));
  }
  return token;
}

}  // namespace prefilld::model
