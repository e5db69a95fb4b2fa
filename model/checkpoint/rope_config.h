// Reads the rotary part of a config.json.
#ifndef PREFILLD_MODEL_CHECKPOINT_ROPE_CONFIG_H_
#define PREFILLD_MODEL_CHECKPOINT_ROPE_CONFIG_H_

#include <cstdint>

#include "model/checkpoint/config.h"
#include "model/checkpoint/config_fields.h"

namespace prefilld::model {

// Reads `rope_theta` beside `rope_scaling` (transformers 4: kind in "type" or "rope_type"), or
// `rope_parameters` (transformers 5: base inside). A file may have both if they say the same.
// Errors go to `fields`.
RopeConfig ReadRopeConfig(ConfigFields& fields, int64_t max_positions);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_ROPE_CONFIG_H_
