// Goldens, which tests/python/make_goldens.py had Hugging Face transformers compute, and their
// models.
#ifndef PREFILLD_TESTS_MODEL_GOLDEN_H_
#define PREFILLD_TESTS_MODEL_GOLDEN_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "model/checkpoint/safetensors.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {

// The checkpoint folder of a golden case. If the case has a recipe (checkpoint.json), the weights
// are made from it as tests/python/golden_cases.py defines them; otherwise the case's folder is the
// checkpoint. Aborts on a broken recipe.
class GoldenCheckpoint {
 public:
  explicit GoldenCheckpoint(const std::string& case_dir);

  const std::string& dir() const { return made_ ? made_->path() : case_dir_; }

 private:
  std::string case_dir_;
  std::unique_ptr<TemporaryFolder> made_;
};

// A golden.safetensors. All tensors of the file are fp32. Aborts when the file is missing or
// broken.
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

#endif  // PREFILLD_TESTS_MODEL_GOLDEN_H_
