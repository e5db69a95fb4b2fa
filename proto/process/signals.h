// The end of a serving process: SIGTERM and SIGINT, taken by one thread at a time.
#ifndef PREFILLD_PROTO_PROCESS_SIGNALS_H_
#define PREFILLD_PROTO_PROCESS_SIGNALS_H_

#include <csignal>

#include <atomic>
#include <functional>
#include <thread>

#include "absl/functional/function_ref.h"

namespace prefilld::process {

// Takes SIGTERM and SIGINT. It must be made before any other thread, so that all threads inherit
// the mask: then no handler runs, and nothing races.
class EndSignals {
 public:
  // Blocks both signals. SIGPIPE is ignored: writing to a connection or a log whose reader is gone
  // is an error code, not the end of the process.
  EndSignals();

  // Waits for a signal and returns it, or returns 0 once `has_failed`, which is asked every 100 ms,
  // says so. From then on the next signal ends the process at once, with failure, whatever it is
  // doing.
  int Await(absl::FunctionRef<bool()> has_failed) const;

  const sigset_t& set() const { return set_; }

 private:
  sigset_t set_;
};

// Ends the process at once, with success, on a signal while this lives. A model that loads may take
// minutes and can be neither broken off nor drained. `on_signal` runs before the end, to log.
class ExitOnSignal {
 public:
  ExitOnSignal(const EndSignals& signals, std::function<void(int signal)> on_signal);
  ~ExitOnSignal();

 private:
  void Run(const EndSignals& signals, const std::function<void(int)>& on_signal);

  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

// Returns "SIGTERM" or "SIGINT".
const char* SignalName(int signal);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_SIGNALS_H_
