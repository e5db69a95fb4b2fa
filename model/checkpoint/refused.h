// Refuses checkpoints that need what the kernels do not compute.
#ifndef PREFILLD_MODEL_CHECKPOINT_REFUSED_H_
#define PREFILLD_MODEL_CHECKPOINT_REFUSED_H_

#include "model/checkpoint/config.h"
#include "model/checkpoint/config_fields.h"

namespace prefilld::model {

// Refuses a model if one of its layers attends to a sliding window that is shorter than the longest
// prompt. A window that is configured, but not used by a layer, is no reason. Who uses it is
// decided as transformers decides it for `config.family`. Needs the shape and the RoPE of `config`.
void RequireFullAttention(ConfigFields& fields, const ModelConfig& config);

// Advice about quantised weights, for messages.
inline constexpr char kUseUnquantized[] =
    "prefilld computes from bf16, fp16 or fp32; use the model's original checkpoint";

// Refuses `quantization_config`, and the fields that other tools write for it, unless they are
// empty. The message names the method, its bits, and what would do instead.
void RefuseQuantization(ConfigFields& fields);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_REFUSED_H_
