// Finds out whether a layer of a model attends to less than the whole prompt.
#ifndef PREFILLD_MODEL_CHECKPOINT_ATTENTION_WINDOW_H_
#define PREFILLD_MODEL_CHECKPOINT_ATTENTION_WINDOW_H_

#include "model/checkpoint/config.h"
#include "model/checkpoint/config_fields.h"

namespace prefilld::model {

// Refuses a model if one of its layers attends to a sliding window that is shorter than the longest
// prompt. A window that is configured, but not used by a layer, is no reason. Who uses it is
// decided as transformers decides it for `config.family`. Needs the shape and the RoPE of `config`.
void RequireFullAttention(ConfigFields& fields, const ModelConfig& config);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_ATTENTION_WINDOW_H_
