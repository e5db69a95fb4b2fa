// The token by which a client tells a server whose requests it makes.
#ifndef PREFILLD_CLIENT_BEARER_TOKEN_H_
#define PREFILLD_CLIENT_BEARER_TOKEN_H_

#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace prefilld::client {

// Comes from a file, because a command line shows in the list of processes. Thread-safe.
class BearerToken {
 public:
  // INVALID_ARGUMENT names the file: it cannot be read, or holds no token of printable ASCII.
  static absl::StatusOr<std::unique_ptr<BearerToken>> Read(const std::string& path);

  // Returns the value of the metadata `authorization`. The file is read again when it has changed
  // and has rested for a second, so that nobody reads half of what is being written. A file that
  // holds no token, or is gone, changes nothing.
  std::string Authorization();

 private:
  explicit BearerToken(std::string path) : path_(std::move(path)) {}

  const std::string path_;
  absl::Mutex mu_;
  std::string token_ ABSL_GUARDED_BY(mu_);
  std::string version_ ABSL_GUARDED_BY(mu_);  // of the file that was looked at last
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_BEARER_TOKEN_H_
