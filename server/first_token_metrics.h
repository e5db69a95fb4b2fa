// The time to the first token, by the policy that ran and the length of the prompt.
#ifndef PREFILLD_SERVER_FIRST_TOKEN_METRICS_H_
#define PREFILLD_SERVER_FIRST_TOKEN_METRICS_H_

#include <cstdint>
#include <vector>

#include <prometheus/family.h>
#include <prometheus/histogram.h>

#include "absl/time/time.h"
#include "model/sparse/attention_policy.h"

namespace prometheus {
class Registry;
}  // namespace prometheus

namespace prefilld::server {

// Returns the value of the label `length`, one of six: a prompt of a thousand tokens and one of a
// hundred thousand have nothing to say about each other.
const char* LengthClass(int64_t num_tokens);

// Thread-safe.
class FirstTokenMetrics {
 public:
  // `upper_bounds` are those of the buckets, in seconds. The registry is borrowed and must outlive
  // this. The series of all policies for serving are there from the start, so that the first
  // request of a kind shows in a rate; those of baselines come with their first request.
  FirstTokenMetrics(prometheus::Registry& registry, std::vector<double> upper_bounds);

  // Counts a request that had its first token so long after its arrival.
  void Observe(model::AttentionPolicy policy, int64_t num_tokens, absl::Duration time);

 private:
  // Returns the series, which is made if it is not there.
  prometheus::Histogram& Series(model::AttentionPolicy policy, const char* length);

  const std::vector<double> upper_bounds_;
  prometheus::Family<prometheus::Histogram>& family_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_FIRST_TOKEN_METRICS_H_
