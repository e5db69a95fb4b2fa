#include "client/pem_file.h"

#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace prefilld::client {

absl::StatusOr<std::string> ReadPemFile(const char* field, const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  // A folder opens like a file. This read fails on it; the iterator's would throw.
  file.peek();
  std::string pem;
  if (file.good()) pem.assign(std::istreambuf_iterator<char>(file), {});
  if (pem.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(field, " ", path, " cannot be read"));
  }
  return pem;
}

}  // namespace prefilld::client
