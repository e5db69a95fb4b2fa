// The models whose goldens tests/python/make_goldens.py had Hugging Face transformers compute.
#ifndef PREFILLD_TESTS_MODEL_GOLDEN_CHECKPOINT_H_
#define PREFILLD_TESTS_MODEL_GOLDEN_CHECKPOINT_H_

#include <memory>
#include <string>

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

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_GOLDEN_CHECKPOINT_H_
