#include "model/decode/sampling.h"

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

// Returns a number uniform in [0, 1), as a pure function of the arguments.
double Uniform(uint64_t seed, int64_t position) {
  return static_cast<double>(Mix(Mix(seed) ^ static_cast<uint64_t>(position)) >> 11) * 0x1p-53;
}

// The ids by falling logit, lowest id first among equals; NaNs rank last. They are sorted only as
// far as asked for, because a draw rarely needs more than the head of a vocabulary.
class Ranking {
 public:
  explicit Ranking(absl::Span<const float> logits) : logits_(logits), ids_(logits.size()) {
    std::iota(ids_.begin(), ids_.end(), 0u);
  }

  size_t size() const { return ids_.size(); }
  uint32_t operator[](size_t rank) {
    if (rank >= sorted_) SortTo(std::max(rank + 1, kGrowth * sorted_));
    return ids_[rank];
  }

 private:
  static constexpr size_t kGrowth = 16;

  void SortTo(size_t count) {
    count = std::min(count, ids_.size());
    const auto value = [&](uint32_t id) {
      return std::isnan(logits_[id]) ? -INFINITY : logits_[id];
    };
    std::partial_sort(
        ids_.begin() + sorted_, ids_.begin() + count, ids_.end(),
        [&](uint32_t a, uint32_t b) { return value(a) != value(b) ? value(a) > value(b) : a < b; });
    sorted_ = count;
  }

  const absl::Span<const float> logits_;
  std::vector<uint32_t> ids_;
  size_t sorted_ = 0;
};

// Computes log(sum(exp(logits))) over the finite logits.
double LogSumExp(absl::Span<const float> logits, double largest) {
  double sum = 0.0;
  for (float logit : logits) {
    if (std::isfinite(logit)) sum += std::exp(logit - largest);
  }
  return largest + std::log(sum);
}

uint32_t Draw(absl::Span<const float> logits, Ranking& ranking, const SamplingOptions& options,
              int64_t position) {
  const double largest = logits[ranking[0]];
  const auto weight = [&](uint32_t id) {
    return std::isfinite(logits[id]) ? std::exp((logits[id] - largest) / options.temperature) : 0.0;
  };
  size_t count = ranking.size();
  double total = 0.0;
  if (options.top_k > 0 && options.top_k < count) {
    count = options.top_k;
    for (size_t i = 0; i < count; ++i) total += weight(ranking[i]);
  } else {
    for (uint32_t id = 0; id < count; ++id) total += weight(id);
  }
  if (options.top_p > 0.0f && options.top_p < 1.0f) {
    double kept = 0.0;
    size_t needed = 0;
    while (needed < count && kept < options.top_p * total) kept += weight(ranking[needed++]);
    count = needed;
    total = kept;
  }
  double left = Uniform(options.seed, position) * total;
  for (size_t i = 0; i < count; ++i) {
    left -= weight(ranking[i]);
    if (left < 0.0) return ranking[i];
  }
  return ranking[0];  // rounding left a remainder
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
  Ranking ranking(logits);
  const uint32_t best = ranking[0];
  if (!std::isfinite(logits[best])) {
    return absl::InternalError(
        absl::StrCat("the logit of token ", best, " at position ", position, " is infinite"));
  }
  const double normalizer = LogSumExp(logits, logits[best]);
  const auto logprob = [&](uint32_t id) { return static_cast<float>(logits[id] - normalizer); };

  SampledToken token;
  token.token_id = options.temperature > 0.0f ? Draw(logits, ranking, options, position) : best;
  token.logprob = logprob(token.token_id);
  for (size_t i = 0; i < std::min<size_t>(options.top_logprobs, ranking.size()); ++i) {
    token.top_logprobs.emplace_back(ranking[i], logprob(ranking[i]));
  }
  return token;
}

}  // namespace prefilld::model
