// The receivers of a request beside its own caller.
#ifndef PREFILLD_SERVER_OTHER_RECEIVERS_H_
#define PREFILLD_SERVER_OTHER_RECEIVERS_H_

#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace prefilld::server {

class PrefillJob;

// A request is computed once, and each of its receivers takes its KV in a layout of its own. The
// first call is one of them and the owner of this list. The others attach while the request waits
// or computes, and are awaited until all have come or nobody waits for them any longer. Each is a
// PrefillJob of its own, which ends alone. Thread-safe.
class OtherReceivers {
 public:
  // `places` receivers are awaited.
  explicit OtherReceivers(int places) : places_(places), awaited_(places > 0) {}

  struct Present {
    std::vector<std::shared_ptr<PrefillJob>> jobs;  // in the order in which they came
    bool awaited = false;                           // others may still come
  };
  Present present() const;

  // Adds a receiver by its work().receiver, 1 to `places`. Errors:
  // - INVALID_ARGUMENT: there is no place of that number.
  // - ALREADY_EXISTS: the receiver of that number has come before.
  // - NOT_FOUND: nobody is awaited any longer.
  absl::Status Add(std::shared_ptr<PrefillJob> receiver);

  // From now on nobody is awaited.
  void Close();

 private:
  const int places_;

  mutable absl::Mutex mu_;
  bool awaited_ ABSL_GUARDED_BY(mu_);
  std::vector<std::shared_ptr<PrefillJob>> jobs_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_OTHER_RECEIVERS_H_
