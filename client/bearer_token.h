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
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace prefilld::client {

// Comes from a file, because a command line shows in the list of processes. Thread-safe.
class BearerToken {
 public:
  // INVALID_ARGUMENT names the file: it cannot be read, or holds no token of printable ASCII.
  static absl::StatusOr<std::unique_ptr<BearerToken>> Read(const std::string& path);

  // Returns the value of the metadata `authorization`. Once a second a call looks at the file,
  // which is read again when it has changed and has rested for a second, so that nobody reads half
  // of what is being written. A file that holds no token, or is gone, changes nothing. If it hangs,
  // it holds up the call that looks, and no other.
  std::string Authorization(absl::Time now = absl::Now());

 private:
  BearerToken(std::string path, std::string version, std::string token)
      : path_(std::move(path)), version_(std::move(version)), token_(std::move(token)) {}

  void Look();

  const std::string path_;
  std::string version_;  // of the file that was read; of the call that looks

  absl::Mutex mu_;
  std::string token_ ABSL_GUARDED_BY(mu_);
  bool looking_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time next_look_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_BEARER_TOKEN_H_
