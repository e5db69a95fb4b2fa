// Reads the rotary part of a config.json.
#ifndef PREFILLD_MODEL_CHECKPOINT_ROPE_CONFIG_H_
#define PREFILLD_MODEL_CHECKPOINT_ROPE_CONFIG_H_

#include <cstdint>

#include "model/checkpoint/config.h"
#include "model/checkpoint/config_fields.h"

namespace prefilld::model {

// Upper limit of every number of positions in a config.json. No model of these families comes near
// it.
inline constexpr int64_t kMaxPositions = int64_t{1} << 28;

// Reads `rope_theta` beside `rope_scaling` (transformers 4: kind in "type" or "rope_type"), or
// `rope_parameters` (transformers 5: base inside). A file may have both if they say the same.
// Errors go to `fields`.
RopeConfig ReadRopeConfig(ConfigFields& fields, int64_t max_positions);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_ROPE_CONFIG_H_
