// The time that one layer of a prompt takes, from what was measured lately.
#ifndef PREFILLD_SERVER_STEP_COST_H_
#define PREFILLD_SERVER_STEP_COST_H_

#include <cstdint>
#include <map>
#include <utility>

#include "absl/time/time.h"
#include "model/sparse/attention_policy.h"

namespace prefilld::server {

// The scheduler compares prompts by the time that they still need. This class predicts it for
// prompts that have not computed a layer yet. It remembers the time per token of each policy, apart
// for each doubling of the length, because attention makes long prompts slower per token and sparse
// policies change by how much. Not thread-safe.
class StepCost {
 public:
  // Records a layer of `num_tokens` tokens. `policy` is the one that was asked for.
  void Record(model::AttentionPolicy policy, int64_t num_tokens, absl::Duration layer);

  // Predicts a layer. Lengths that were not measured are taken as fast per token as the nearest
  // measured length below them, or else above them. Before anything of the policy was measured, the
  // prediction is kUnmeasuredPerToken a token, which at least orders prompts by length.
  absl::Duration Layer(model::AttentionPolicy policy, int64_t num_tokens) const;

  static constexpr absl::Duration kUnmeasuredPerToken = absl::Microseconds(1);

 private:
  using Key = std::pair<model::AttentionPolicy, int>;  // the length's number of bits

  std::map<Key, absl::Duration> per_token_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_STEP_COST_H_
