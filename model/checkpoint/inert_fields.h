// The fields of a config.json that cannot change what the layers compute.
#ifndef PREFILLD_MODEL_CHECKPOINT_INERT_FIELDS_H_
#define PREFILLD_MODEL_CHECKPOINT_INERT_FIELDS_H_

#include "model/checkpoint/config_fields.h"

namespace prefilld::model {

// Ignores the fields of training, generation, tokenizers and bookkeeping.
void IgnoreInertFields(ConfigFields& fields);

// Ignores the fields of a RoPE object that change nothing: marks such as "finetuned", and
// parameters of other kinds of RoPE, which transformers does not read either. Must be called after
// those of the object's own kind were read.
void IgnoreInertRopeFields(ConfigFields& fields);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_INERT_FIELDS_H_
