// The tokens of a run on their way through the layers.
#ifndef PREFILLD_MODEL_PREFILL_HIDDEN_STATES_H_
#define PREFILLD_MODEL_PREFILL_HIDDEN_STATES_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/prefill/packed_prompts.h"

namespace prefilld::model {

// Everything that LayerStep carries from one layer of a run to the next: hidden states, and what
// rotates queries and keys. LayerStep::Embed starts a run and fills all of it. The memory is
// allocated once. It holds one run at a time, and may hold one run after the other.
struct HiddenStates {
  // Allocates for runs of at most max_tokens. Runs of several prompts have at most
  // max_batch_tokens; 0 means that there are none.
  static absl::StatusOr<HiddenStates> Create(Device* device, const ModelConfig& config,
                                             int64_t max_tokens, int64_t max_batch_tokens);

  // Device memory.
  DeviceBuffer values;     // [max_tokens, hidden], in the compute dtype
  DeviceBuffer positions;  // [max_batch_tokens] int32; read if the run has several prompts
  DeviceBuffer inv_freq;   // [head_dim / 2] fp32, of `rotation`

  int64_t num_tokens = 0;           // padding included
  int64_t first_position = 0;       // of the first token, if the run has one prompt
  std::vector<PromptPlace> places;  // of the prompts
  RopeTable rotation;               // its frequencies are in inv_freq
  int64_t rope_tokens = 0;          // the prompt length that rotation was made for; 0: none yet
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_HIDDEN_STATES_H_
