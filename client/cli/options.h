// The command line of prefill-cli. Flags are read here and nowhere else.
#ifndef PREFILLD_CLIENT_CLI_OPTIONS_H_
#define PREFILLD_CLIENT_CLI_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cli/bench_options.h"
#include "client/prefill_client.h"
#include "prefill/v1/kv.pb.h"
#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/sampling.pb.h"

namespace prefilld::client {

enum class Command : uint8_t { kGenerate, kPrefill, kBench, kBenchKv, kInfo, kHealth };

// The source of a prompt. "-" as a file is standard input.
struct PromptSource {
  std::optional<std::string> text;
  std::optional<std::string> text_file;
  std::optional<std::string> token_ids;
  std::optional<std::string> token_ids_file;
  std::string model_dir;           // of the model that is served; a text needs it
  std::string python = "python3";  // runs the tokenizer of the Python client
  int bos = 256;                   // put before the bytes of a text; -1: nothing
};

struct CliOptions {
  Command command = Command::kGenerate;
  // They are tried in turn.
  std::vector<std::string> workers;
  std::vector<std::string> servers;
  ChannelOptions channel;  // what is common to all of them
  absl::Duration timeout = absl::InfiniteDuration();
  bool json = false;
  bool quiet = false;

  std::string service;  // of the command health

  PromptSource prompt;
  std::string request_id;
  int32_t priority = 0;
  ::prefill::v1::AttentionOptions attention;
  ::prefill::v1::Sampling sampling;

  // Options of the command generate.
  uint32_t max_new_tokens = 64;
  std::vector<uint32_t> stop_token_ids;
  bool ignore_eos = false;
  std::string pushed_transfer_id;

  // Options of the command prefill, of which bench has most, too.
  ::prefill::v1::KvLayoutRequest layout;
  uint32_t lanes = 0;  // 0: by the size of the prompt's KV
  bool layer_stats = false;
  bool prompt_logprobs = false;
  ::prefill::v1::PrefixCacheOptions prefix_cache;
  Metadata metadata;
  std::string deliver_to;
  std::string transfer_id;

  BenchOptions bench;
  KvBenchOptions kv_bench;
};

// Reads the command line. INVALID_ARGUMENT lists every problem.
absl::StatusOr<CliOptions> OptionsFromCommandLine(int argc, char** argv);

// The second half of that: the options that the flags, as they are set now, stand for. `positional`
// is the program's name and the command.
absl::StatusOr<CliOptions> OptionsFromFlags(const std::vector<char*>& positional);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_OPTIONS_H_
