// prefill-cli talks to a decode worker or to prefilld from the command line.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/strings/str_join.h"
#include "client/cancellation.h"
#include "client/cli/commands.h"
#include "client/cli/options.h"
#include "client/cli/summary.h"
#include "proto/process/kept_memory.h"

namespace prefilld::client {
namespace {

constexpr int kExitInterrupted = 130;

// The first Ctrl-C cancels the call, so that the servers stop at once. The second one ends this
// program.
void CancelOnInterrupt(Cancellation& cancellation) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::thread([signals, &cancellation] {
    int signal;
    sigwait(&signals, &signal);
    cancellation.Cancel();
    sigwait(&signals, &signal);
    _exit(kExitInterrupted);
  }).detach();
}

absl::Status RunCommand(const CliOptions& options, Cancellation& cancellation) {
  switch (options.command) {
    case Command::kGenerate:
      return RunGenerate(options, cancellation);
    case Command::kPrefill:
      return RunPrefill(options, cancellation);
    case Command::kBench:
      return RunBench(options, cancellation);
    case Command::kBenchKv:
      return RunBenchKv(options, cancellation);
    case Command::kInfo:
      return RunInfo(options);
    case Command::kHealth:
      return RunHealth(options);
  }
  return absl::OkStatus();
}

int ExitCode(const absl::Status& status, const Cancellation& cancellation) {
  if (cancellation.cancelled()) return kExitInterrupted;
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
      return 2;
    case absl::StatusCode::kUnavailable:
      return 3;
    case absl::StatusCode::kResourceExhausted:
      return 4;
    default:
      return 1;
  }
}

}  // namespace
}  // namespace prefilld::client

int main(int argc, char** argv) {
  using namespace prefilld::client;
  prefilld::process::KeepFreedMemory();
  const absl::StatusOr<CliOptions> options = OptionsFromCommandLine(argc, argv);
  if (!options.ok()) {
    std::fprintf(stderr, "prefill-cli: %s\n", std::string(options.status().message()).c_str());
    return 2;
  }
  // This lives to the end of the process, as the thread that waits for signals does.
  static Cancellation cancellation;
  CancelOnInterrupt(cancellation);
  const absl::Status status = RunCommand(*options, cancellation);
  if (!status.ok()) {
    const bool to_worker = options->command == Command::kGenerate;
    const std::string addresses =
        absl::StrJoin(to_worker ? options->workers : options->servers, ", ");
    std::fprintf(stderr, "prefill-cli: %s\n", ErrorText(status, addresses).c_str());
  }
  return ExitCode(status, cancellation);
}
