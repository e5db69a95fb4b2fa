// Refuses checkpoints of quantised weights, by name and method.
#ifndef PREFILLD_MODEL_CHECKPOINT_QUANTIZATION_CONFIG_H_
#define PREFILLD_MODEL_CHECKPOINT_QUANTIZATION_CONFIG_H_

#include "model/checkpoint/config_fields.h"

namespace prefilld::model {

// Advice about quantised weights, for messages.
inline constexpr char kUseUnquantized[] =
    "prefilld computes from bf16, fp16 or fp32; use the model's original checkpoint";

// Refuses `quantization_config`, and the fields that other tools write for it, unless they are
// empty. The message names the method, its bits, and what would do instead.
void RefuseQuantization(ConfigFields& fields);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_QUANTIZATION_CONFIG_H_
