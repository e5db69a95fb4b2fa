#include "model/prefill/hidden_states.h"

#include "proto/status_macros.h"

namespace prefilld::model {

absl::StatusOr<HiddenStates> HiddenStates::Create(Device* device, const ModelConfig& config,
                                                  int64_t max_tokens, int64_t max_batch_tokens) {
  HiddenStates states;
  const auto element = static_cast<int64_t>(kernels::SizeOf(device->traits().compute_dtype));
  PREFILLD_ASSIGN_OR_RETURN(states.values, device->Allocate(max_tokens * config.hidden * element));
  if (max_batch_tokens > 0) {
    PREFILLD_ASSIGN_OR_RETURN(states.positions,
                              device->Allocate(max_batch_tokens * sizeof(int32_t)));
  }
  PREFILLD_ASSIGN_OR_RETURN(states.inv_freq, device->Allocate(config.head_dim / 2 * sizeof(float)));
  return states;
}

}  // namespace prefilld::model
