// Linked into programs that run under ThreadSanitizer. The distribution's Abseil is not
// instrumented, so the sanitizer does not see that its mutexes order threads. These definitions
// come before the library's, tell the sanitizer, and call the library.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace absl {
ABSL_NAMESPACE_BEGIN
namespace {

// Finds the library's own definition. `debian3` is the inline namespace that Debian gives its
// Abseil.
template <typename Result, typename... Arguments>
auto Library(const char* mangled_name) {
  return reinterpret_cast<Result (*)(Arguments...)>(dlsym(RTLD_NEXT, mangled_name));
}

// The library evaluates conditions in any thread that holds the mutex.
struct OrderedCondition {
  const Condition& condition;
  Mutex* mutex;

  bool Eval() const {
    __tsan_acquire(mutex);
    const bool met = condition.Eval();
    __tsan_release(mutex);
    return met;
  }
};

}  // namespace

void Mutex::Lock() {
  static const auto library = Library<void, Mutex*>("_ZN4absl7debian35Mutex4LockEv");
  library(this);
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static const auto library = Library<void, Mutex*>("_ZN4absl7debian35Mutex6UnlockEv");
  __tsan_release(this);
  library(this);
}

bool Mutex::TryLock() {
  static const auto library = Library<bool, Mutex*>("_ZN4absl7debian35Mutex7TryLockEv");
  const bool locked = library(this);
  if (locked) __tsan_acquire(this);
  return locked;
}

void Mutex::ReaderLock() {
  static const auto library = Library<void, Mutex*>("_ZN4absl7debian35Mutex10ReaderLockEv");
  library(this);
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static const auto library = Library<void, Mutex*>("_ZN4absl7debian35Mutex12ReaderUnlockEv");
  __tsan_release(this);
  library(this);
}

void Mutex::Await(const Condition& condition) {
  static const auto library =
      Library<void, Mutex*, const Condition&>("_ZN4absl7debian35Mutex5AwaitERKNS0_9ConditionE");
  const OrderedCondition ordered{condition, this};
  __tsan_release(this);
  library(this, Condition(&ordered, &OrderedCondition::Eval));
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static const auto library = Library<bool, Mutex*, const Condition&, Duration>(
      "_ZN4absl7debian35Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  const OrderedCondition ordered{condition, this};
  __tsan_release(this);
  const bool met = library(this, Condition(&ordered, &OrderedCondition::Eval), timeout);
  __tsan_acquire(this);
  return met;
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static const auto library = Library<bool, Mutex*, const Condition&, Time>(
      "_ZN4absl7debian35Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  const OrderedCondition ordered{condition, this};
  __tsan_release(this);
  const bool met = library(this, Condition(&ordered, &OrderedCondition::Eval), deadline);
  __tsan_acquire(this);
  return met;
}

ABSL_NAMESPACE_END
}  // namespace absl

// gRPC, Abseil and Prometheus are not instrumented either, so what gRPC hands from thread to thread
// looks unordered. Only races of our own threads with each other are reported.
extern "C" const char* __tsan_default_options() { return "ignore_noninstrumented_modules=1"; }

extern "C" const char* __tsan_default_suppressions() {
  return "race:libgrpc\n"
         "race:libabsl\n"
         "race:libprometheus\n"
         "race:grpc::internal::\n";
}
