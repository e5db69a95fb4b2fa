// The end of a serving process: SIGTERM and SIGINT, taken by one thread at a time.
#ifndef PREFILLD_PROTO_PROCESS_SIGNALS_H_
#define PREFILLD_PROTO_PROCESS_SIGNALS_H_

#include <csignal>

#include <atomic>
#include <functional>
#include <thread>

#include "absl/functional/function_ref.h"

namespace prefilld::process {

// Made before any other thread, which then inherit the mask: no handler runs, and nothing races.
class EndSignals {
 public:
  // Blocks both signals. SIGPIPE is ignored: writing to a connection or a log whose reader is gone
  // is an error code, not the end of the process.
  EndSignals();

  // Waits for a signal and returns it, or 0 once `has_failed`, asked every 100 ms, says so. From
  // then on the next signal ends the process at once, with failure, whatever it is doing.
  int Await(absl::FunctionRef<bool()> has_failed) const;

  const sigset_t& set() const { return set_; }

 private:
  sigset_t set_;
};

// Ends the process at once on a signal while this lives, with success: a model that loads, which
// may take minutes, can be neither broken off nor drained. `on_signal` runs before, to log.
class ExitOnSignal {
 public:
  ExitOnSignal(const EndSignals& signals, std::function<void(int signal)> on_signal);
  ~ExitOnSignal();

 private:
  void Run(const EndSignals& signals, const std::function<void(int)>& on_signal);

  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

// "SIGTERM" or "SIGINT".
const char* SignalName(int signal);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_SIGNALS_H_
