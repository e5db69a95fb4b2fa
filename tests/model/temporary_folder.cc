#include "tests/model/temporary_folder.h"

#include <stdlib.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace prefilld::model {
namespace {

[[noreturn]] void FailAt(const std::string& what) {
  std::perror(what.c_str());
  abort();
}

}  // namespace

TemporaryFolder::TemporaryFolder()
    : path_((std::filesystem::temp_directory_path() / "prefilld-XXXXXX").string()) {
  if (mkdtemp(path_.data()) == nullptr) FailAt(path_);
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void TemporaryFolder::Write(absl::string_view name, absl::string_view content) const {
  const std::string path = absl::StrCat(path_, "/", name);
  // Some file systems flush a file that is overwritten, which takes milliseconds.
  std::error_code ignored;
  std::filesystem::remove(path, ignored);
  std::ofstream file(path, std::ios::binary);
  file << content;
  file.close();
  if (!file) FailAt(path);
}

}  // namespace prefilld::model
