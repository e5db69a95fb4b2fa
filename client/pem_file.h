#ifndef PREFILLD_CLIENT_PEM_FILE_H_
#define PREFILLD_CLIENT_PEM_FILE_H_

#include <string>

#include "absl/status/statusor.h"

namespace prefilld::client {

// The file's content; nothing for no path. INVALID_ARGUMENT names `field` and path when it cannot
// be read or is empty.
absl::StatusOr<std::string> ReadPemFile(const char* field, const std::string& path);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_PEM_FILE_H_
