#ifndef PREFILLD_TESTS_INTEGRATION_CHILD_PROCESS_H_
#define PREFILLD_TESTS_INTEGRATION_CHILD_PROCESS_H_

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/wire/port_file.h"

namespace prefilld::integration {

// A program of this build, run as a process and killed on destruction. Its output goes to files.
// Not thread-safe.
class ChildProcess {
 public:
  // `program` is a name in the build's bin folder. Its standard error goes to `error_descriptor`
  // instead of a file, if one is given.
  ChildProcess(const std::string& program, const std::vector<std::string>& args,
               int error_descriptor = -1);
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  void Signal(int signal);
  pid_t pid() const { return pid_; }
  // Waits until the program's main thread blocks the signal, which our programs do to take it with
  // a thread of its own. Returns false when that takes longer than `timeout`.
  bool AwaitBlocked(int signal, absl::Duration timeout) const;
  // Returns the exit code, or 128 + the signal that ended the process, or nullopt if it still runs
  // after `timeout`.
  std::optional<int> Wait(absl::Duration timeout);

  std::string stdout_text() const;
  std::string stderr_text() const;
  // Waits until `text` is among what the program wrote to its standard error. Returns false when
  // that takes longer than `timeout`.
  bool AwaitStderr(const std::string& text, absl::Duration timeout) const;

 private:
  const std::string folder_;
  pid_t pid_ = -1;
  std::optional<int> exit_code_;
};

// A server program with --port_file. It is ready when the constructor returns; otherwise the
// constructor aborts with the program's log.
class ServerProcess : public ChildProcess {
 public:
  // Listens on free ports of 127.0.0.1, unless `args` name another --listen or --metrics_listen.
  ServerProcess(const std::string& program, std::vector<std::string> args,
                int error_descriptor = -1);

  // "127.0.0.1:<port>"
  std::string address() const { return AddressOf(ports_.grpc); }
  std::string metrics_address() const { return AddressOf(ports_.metrics); }
  std::string kv_bench_address() const { return AddressOf(ports_.kv_bench); }

 private:
  ServerProcess(const std::string& program, std::vector<std::string> args,
                const std::string& port_file, int error_descriptor);
  static std::string AddressOf(int port);

  wire::Ports ports_;
};

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_CHILD_PROCESS_H_
