// The signals of a serving process: SIGTERM and SIGINT, which end it, and SIGHUP, which makes it
// read its files again. They are taken by one thread at a time.
#ifndef PREFILLD_PROTO_PROCESS_SIGNALS_H_
#define PREFILLD_PROTO_PROCESS_SIGNALS_H_

#include <csignal>

#include <atomic>
#include <functional>
#include <thread>

#include "absl/functional/function_ref.h"

namespace prefilld::process {

// Takes SIGTERM, SIGINT and SIGHUP. It must be made before any other thread, so that all threads
// inherit the mask: then no handler runs, and nothing races.
class EndSignals {
 public:
  // Blocks these signals. SIGPIPE is ignored: writing to a connection or a log whose reader is gone
  // is an error code, not the end of the process.
  EndSignals();

  // Waits for SIGTERM or SIGINT and returns it, or returns 0 once `has_failed`, which is asked
  // every 100 ms, says so. From then on the next of these signals ends the process at once, with
  // failure, whatever it is doing. Runs `on_hangup` at each SIGHUP that comes before that; later
  // ones do nothing.
  int Await(absl::FunctionRef<bool()> has_failed, absl::FunctionRef<void()> on_hangup) const;

  const sigset_t& set() const { return set_; }

 private:
  sigset_t set_;
};

// Ends the process at once, with success, on SIGTERM or SIGINT while this lives. A model that loads
// may take minutes and can be neither broken off nor drained. `on_signal` runs before the end, to
// log. A SIGHUP waits for Await.
class ExitOnSignal {
 public:
  ExitOnSignal(const EndSignals& signals, std::function<void(int signal)> on_signal);
  ~ExitOnSignal();

 private:
  void Run(const EndSignals& signals, const std::function<void(int)>& on_signal);

  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

// Ends the process with this code once the log is out. It waits for no thread and destroys nothing.
[[noreturn]] void ExitAtOnce(int code);

// Returns "SIGTERM" or "SIGINT".
const char* SignalName(int signal);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_SIGNALS_H_
