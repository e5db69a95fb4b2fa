// The settings of a decode worker. Flags are read here and nowhere else.
#ifndef PREFILLD_CLIENT_DECODE_WORKER_OPTIONS_H_
#define PREFILLD_CLIENT_DECODE_WORKER_OPTIONS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/decode_worker/cache_writer.h"
#include "model/decode/decoder.h"
#include "proto/process/log.h"
#include "proto/wire/channel.h"
#include "proto/wire/tls.h"

namespace prefilld::client {

struct WorkerOptions {
  model::DecoderOptions decoder;

  // host:port (port 0: any free one) and unix:/path, several of them separated by commas.
  std::string listen = "0.0.0.0:50052";
  wire::ServerTls tls;
  std::string metrics_listen;  // empty: no metrics endpoint
  std::string port_file;       // when set, the chosen ports are written here once all is ready
  process::LogFormat log_format = process::LogFormat::kText;

  std::vector<std::string> prefill_addresses;  // they take turns; empty: only pushed caches
  wire::ChannelOptions prefill;                // what is common to all of them
  uint32_t lanes = 0;                          // 0: by the size of the prompt's KV
  WireKv wire_kv = WireKv::kAsCached;

  int64_t max_connections = 1024;  // open at once; more are refused
  int64_t max_new_tokens_limit = 4096;
  int max_requests = 64;  // at once, those waiting for their prefill included
  absl::Duration transfer_timeout = absl::Seconds(120);
  absl::Duration push_resume_window = absl::Seconds(10);  // 0: a push ends with its connection
  absl::Duration stall_timeout = absl::Seconds(30);
  absl::Duration drain_timeout = absl::Seconds(25);
};

// Reads the command line. An unknown flag ends the process with a message. INVALID_ARGUMENT lists
// every invalid value, not only the first.
absl::StatusOr<WorkerOptions> OptionsFromCommandLine(int argc, char** argv);

// Lists the effective configuration as (flag, value) pairs, for the log.
std::vector<std::pair<std::string, std::string>> Describe(const WorkerOptions& options);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_OPTIONS_H_
