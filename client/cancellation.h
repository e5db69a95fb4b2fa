#ifndef PREFILLD_CLIENT_CANCELLATION_H_
#define PREFILLD_CLIENT_CANCELLATION_H_

#include <list>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

namespace prefilld::client {

// One request's wish to stop, passed from the thread that decides to the threads that wait.
// Thread-safe. Must outlive the CancelHooks on it.
class Cancellation {
 public:
  // Runs the hooks that are registered, in the calling thread. Idempotent.
  void Cancel();
  bool cancelled() const;

 private:
  friend class CancelHook;
  using Hooks = std::list<absl::AnyInvocable<void()>>;

  mutable absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  Hooks hooks_ ABSL_GUARDED_BY(mu_);
};

// Calls `hook` on cancellation, or at once if that has happened already, for as long as this lives:
// once the destructor has returned, the hook neither runs nor will run. The hook must not block,
// nor touch the Cancellation. A null `cancellation` never cancels.
class CancelHook {
 public:
  CancelHook(Cancellation* cancellation, absl::AnyInvocable<void()> hook);
  ~CancelHook();
  CancelHook(const CancelHook&) = delete;
  CancelHook& operator=(const CancelHook&) = delete;

 private:
  Cancellation* const cancellation_;
  Cancellation::Hooks::iterator position_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CANCELLATION_H_
