#include "server/first_token_metrics.h"

#include <limits>
#include <utility>

#include <prometheus/registry.h>

namespace prefilld::server {
namespace {

struct Class {
  int64_t most_tokens;
  const char* name;
};
constexpr Class kClasses[] = {
    {1 << 10, "0-1k"},     {4 << 10, "1k-4k"},      {16 << 10, "4k-16k"},
    {64 << 10, "16k-64k"}, {256 << 10, "64k-256k"}, {std::numeric_limits<int64_t>::max(), "256k-"}};

}  // namespace

const char* LengthClass(int64_t num_tokens) {
  const Class* found = kClasses;
  while (num_tokens > found->most_tokens) ++found;
  return found->name;
}

FirstTokenMetrics::FirstTokenMetrics(prometheus::Registry& registry,
                                     std::vector<double> upper_bounds)
    : upper_bounds_(std::move(upper_bounds)),
      family_(prometheus::BuildHistogram()
                  .Name("prefilld_time_to_first_token_seconds")
                  .Help("From the arrival of a request to its first token, queue included, by the "
                        "policy that ran and the length of the prompt (k: 1024 tokens).")
                  .Register(registry)) {
  for (const model::AttentionPolicy policy : model::PoliciesForServing()) {
    if (policy == model::AttentionPolicy::kAuto) continue;  // resolved before it runs
    for (const Class& length : kClasses) Series(policy, length.name);
  }
}

void FirstTokenMetrics::Observe(model::AttentionPolicy policy, int64_t num_tokens,
                                absl::Duration time) {
  Series(policy, LengthClass(num_tokens)).Observe(absl::ToDoubleSeconds(time));
}

prometheus::Histogram& FirstTokenMetrics::Series(model::AttentionPolicy policy,
                                                 const char* length) {
  return family_.Add({{"policy", model::Name(policy)}, {"length", length}}, upper_bounds_);
}

}  // namespace prefilld::server
