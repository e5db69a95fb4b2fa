#ifndef PREFILLD_TESTS_MODEL_TEMPORARY_FOLDER_H_
#define PREFILLD_TESTS_MODEL_TEMPORARY_FOLDER_H_

#include <string>

#include "absl/strings/string_view.h"

namespace prefilld::model {

// A folder under the system's temporary directory, removed on destruction. Aborts when the disk
// refuses.
class TemporaryFolder {
 public:
  TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder();

  const std::string& path() const { return path_; }
  void Write(absl::string_view name, absl::string_view content) const;

 private:
  std::string path_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_TEMPORARY_FOLDER_H_
