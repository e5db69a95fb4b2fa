// The parts of a checkpoint's files that are left out of account because they cannot change what
// the layers compute.
#ifndef PREFILLD_MODEL_CHECKPOINT_IGNORED_H_
#define PREFILLD_MODEL_CHECKPOINT_IGNORED_H_

#include <string>
#include <utility>
#include <vector>

#include "model/checkpoint/config.h"
#include "model/checkpoint/config_fields.h"

namespace prefilld::model {

// Returns (what, names) pairs for the log: fields of config.json that change nothing, and tensors
// that the model does not use (Weights::unused_tensors). Long lists are cut, and their length is
// given. Empty if everything was used.
std::vector<std::pair<std::string, std::string>> DescribeIgnored(
    const ModelConfig& config, const std::vector<std::string>& unused_tensors);

// Ignores the fields of training, generation, tokenizers and bookkeeping.
void IgnoreInertFields(ConfigFields& fields);

// Ignores the fields of a RoPE object that change nothing: marks such as "finetuned", and
// parameters of other kinds of RoPE, which transformers does not read either. Must be called after
// those of the object's own kind were read.
void IgnoreInertRopeFields(ConfigFields& fields);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_IGNORED_H_
