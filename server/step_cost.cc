#include "server/step_cost.h"

#include <bit>

namespace prefilld::server {
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
