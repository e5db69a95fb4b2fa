// The fingerprint that two processes compare to know that they hold the same model.
#ifndef PREFILLD_MODEL_CHECKPOINT_FINGERPRINT_H_
#define PREFILLD_MODEL_CHECKPOINT_FINGERPRINT_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "model/checkpoint/config.h"
#include "model/checkpoint/safetensors.h"

namespace prefilld::model {

// The digest of one stretch of a tensor's bytes.
struct ContentDigest {
  uint64_t low = 0;
  uint64_t high = 0;
};
ContentDigest DigestContent(const void* data, size_t bytes);

// A tensor's content is digested in stretches of this many elements (the last one shorter), so
// that it can be done in parallel.
inline constexpr int64_t kDigestElements = int64_t{1} << 21;

struct TensorDigest {
  const Tensor* tensor = nullptr;
  std::vector<ContentDigest> stretches;
};

// Returns 32 hexadecimal digits: XXH3-128 over a canonical text of the configuration's facts that
// change what the model computes, and per tensor, sorted by name, its name, dtype, shape and
// digests.
std::string Fingerprint(const ModelConfig& config,
                        const std::map<std::string, TensorDigest>& tensors);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_FINGERPRINT_H_
