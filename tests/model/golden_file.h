// Reads a golden.safetensors of tests/python/make_goldens.py.
#ifndef PREFILLD_TESTS_MODEL_GOLDEN_FILE_H_
#define PREFILLD_TESTS_MODEL_GOLDEN_FILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "model/checkpoint/safetensors.h"

namespace prefilld::model {

// All tensors of the file are fp32. Aborts when the file is missing or broken.
class GoldenFile {
 public:
  explicit GoldenFile(const std::string& path);
  GoldenFile(const GoldenFile&) = delete;
  GoldenFile& operator=(const GoldenFile&) = delete;

  absl::Span<const float> Get(absl::string_view name) const;
  // Returns the prompt lengths of the file in ascending order.
  std::vector<int64_t> lengths() const;

 private:
  std::string content_;
  TensorMap tensors_;  // within content_
};

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_GOLDEN_FILE_H_
