// Tells what of a checkpoint's files was left out of account, for the log.
#ifndef PREFILLD_MODEL_CHECKPOINT_IGNORED_H_
#define PREFILLD_MODEL_CHECKPOINT_IGNORED_H_

#include <string>
#include <utility>
#include <vector>

#include "model/checkpoint/config.h"

namespace prefilld::model {

// Returns (what, names) pairs: fields of config.json that change nothing, and tensors that the
// model does not use (Weights::unused_tensors). Long lists are cut, and their length is given.
// Empty if everything was used.
std::vector<std::pair<std::string, std::string>> DescribeIgnored(
    const ModelConfig& config, const std::vector<std::string>& unused_tensors);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_IGNORED_H_
