#include "proto/process/signals.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "absl/time/time.h"
#include "proto/process/log.h"

namespace prefilld::process {
namespace {

// The process's end is not to wait longer than that for a log that nobody reads.
constexpr absl::Duration kFlushTime = absl::Milliseconds(500);

void EndAtOnce(int) { _exit(EXIT_FAILURE); }

}  // namespace

EndSignals::EndSignals() {
  sigemptyset(&set_);
  sigaddset(&set_, SIGTERM);
  sigaddset(&set_, SIGINT);
  sigset_t all = set_;
  sigaddset(&all, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

int EndSignals::Await(absl::FunctionRef<bool()> has_failed,
                      absl::FunctionRef<void()> on_hangup) const {
  constexpr timespec kPoll = {.tv_sec = 0, .tv_nsec = 100'000'000};
  sigset_t all = set_;
  sigaddset(&all, SIGHUP);
  int taken = 0;
  while (taken <= 0 && !has_failed()) {
    taken = sigtimedwait(&all, nullptr, &kPoll);
    if (taken != SIGHUP) continue;
    on_hangup();
    // The system delivers SIGHUP before the others that wait.
    constexpr timespec kNow = {};
    taken = sigtimedwait(&set_, nullptr, &kNow);
  }
  std::signal(SIGTERM, &EndAtOnce);
  std::signal(SIGINT, &EndAtOnce);
  pthread_sigmask(SIG_UNBLOCK, &set_, nullptr);
  return taken > 0 ? taken : 0;
}

ExitOnSignal::ExitOnSignal(const EndSignals& signals, std::function<void(int)> on_signal)
    : thread_([this, &signals, on_signal = std::move(on_signal)] { Run(signals, on_signal); }) {}

ExitOnSignal::~ExitOnSignal() {
  stop_ = true;
  thread_.join();
}

void ExitOnSignal::Run(const EndSignals& signals, const std::function<void(int)>& on_signal) {
  constexpr timespec kPoll = {.tv_sec = 0, .tv_nsec = 20'000'000};
  while (!stop_) {
    const int signal = sigtimedwait(&signals.set(), nullptr, &kPoll);
    if (signal <= 0) continue;
    on_signal(signal);
    ExitAtOnce(EXIT_SUCCESS);
  }
}

void ExitAtOnce(int code) {
  FlushLog(kFlushTime);
  _exit(code);
}

const char* SignalName(int signal) { return signal == SIGTERM ? "SIGTERM" : "SIGINT"; }

}  // namespace prefilld::process
