// The commands of prefill-cli. Each prints its results itself.
#ifndef PREFILLD_CLIENT_CLI_COMMANDS_H_
#define PREFILLD_CLIENT_CLI_COMMANDS_H_

#include "absl/status/status.h"
#include "client/cancellation.h"
#include "client/cli/options.h"

namespace prefilld::client {

absl::Status RunGenerate(const CliOptions& options, Cancellation& cancellation);
absl::Status RunPrefill(const CliOptions& options, Cancellation& cancellation);
absl::Status RunBench(const CliOptions& options, Cancellation& cancellation);
absl::Status RunBenchKv(const CliOptions& options, Cancellation& cancellation);
absl::Status RunInfo(const CliOptions& options);
// UNAVAILABLE when the service does not serve.
absl::Status RunHealth(const CliOptions& options);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_COMMANDS_H_
