#include "client/cli/options.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <optional>

#include "absl/flags/flag.h"
#include "absl/flags/reflection.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/lane_choice.h"
#include "proto/process/command_line.h"
#include "proto/process/problems.h"
#include "proto/status_macros.h"
#include "proto/wire/enum_names.h"
#include "proto/wire/host_port.h"

ABSL_FLAG(std::string, worker, "localhost:50052",
          "host:port of the decode worker, or unix:/path (generate). Of several, separated by "
          "commas, the first one that can be reached is asked.");
ABSL_FLAG(
    std::string, server, "localhost:50051",
    "host:port of prefilld, or unix:/path (prefill, info), or of a decode worker (health). Of "
    "several, separated by commas, one that can be reached is asked, by health the first.");
ABSL_FLAG(bool, tls, false, "Connect with TLS.");
ABSL_FLAG(std::string, tls_ca, "", "PEM certificates that sign the server's. Empty: the system's.");
ABSL_FLAG(std::string, tls_cert, "", "PEM certificate to show to the server (mutual TLS).");
ABSL_FLAG(std::string, tls_key, "", "PEM private key of --tls_cert.");
ABSL_FLAG(std::string, tls_name, "",
          "Name to verify in the server's certificate. Empty: the host.");
ABSL_FLAG(bool, use_proxy, false,
          "Connect through the HTTP proxy that grpc_proxy, https_proxy or http_proxy names. "
          "Otherwise these variables are ignored.");
ABSL_FLAG(double, timeout_s, 0, "Deadline of the call. 0: none.");
ABSL_FLAG(std::string, service, "",
          "health: the service that is asked. liveness: does work progress; empty: is it ready.");
ABSL_FLAG(bool, json, false, "Print one JSON object on standard output and nothing else there.");
ABSL_FLAG(bool, quiet, false, "No progress and no summary on standard error.");

ABSL_FLAG(std::optional<std::string>, text, std::nullopt,
          "Prompt as text. --model says how it becomes tokens.");
ABSL_FLAG(std::optional<std::string>, text_file, std::nullopt,
          "File with the prompt as text. -: standard input.");
ABSL_FLAG(
    std::optional<std::string>, token_ids, std::nullopt,
    "Prompt as token ids, separated by commas or spaces, or JSON: a list, or an object with a list "
    "\"token_ids\".");
ABSL_FLAG(std::optional<std::string>, token_ids_file, std::nullopt,
          "File with the prompt as token ids, in the same forms. -: standard input.");
ABSL_FLAG(
    std::string, model, "",
    "Folder of the model that is served, for prompts that are text: tokenizer.json turns them "
    "into tokens, and a byte-level model (\"byte_tokens\": true in config.json) takes the bytes. "
    "A server whose model has another vocabulary or number of layers is not asked.");
ABSL_FLAG(
    std::string, python, "python3",
    "Python with the package prefilld[tokenizer] (client/python), which reads tokenizer.json.");
ABSL_FLAG(int32_t, bos, 256,
          "Token to put before the bytes of a text for a byte-level model; 256 suits the embedded "
          "one. -1: none.");
ABSL_FLAG(std::string, request_id, "", "Name of the request in logs. Empty: chosen for you.");

ABSL_FLAG(
    int32_t, priority, 0,
    "Class of the prefill, -7 to 7: higher ones go first, as far as the server's operator lets "
    "you.");

ABSL_FLAG(int32_t, max_new_tokens, 64, "Tokens to generate.");
ABSL_FLAG(std::vector<std::string>, stop_token_ids, {},
          "Token ids that end the generation, beside the model's own.");
ABSL_FLAG(bool, ignore_eos, false, "Go on past the model's end tokens.");
ABSL_FLAG(float, temperature, 0, "0: greedy, the most likely token.");
ABSL_FLAG(uint32_t, top_k, 0, "Draw from the k most likely tokens. 0: all.");
ABSL_FLAG(float, top_p, 0, "Draw from the likeliest tokens that reach this probability. 0: all.");
ABSL_FLAG(uint64_t, seed, 0, "Seed of the draw; bench: of arrivals and of tokens.");
ABSL_FLAG(uint32_t, top_logprobs, 0, "Log-probabilities of so many tokens per step (with --json).");
ABSL_FLAG(std::string, pushed_transfer_id, "",
          "generate: wait for a cache that `prefill --deliver_to` pushes under this id.");

ABSL_FLAG(std::string, policy, "",
          absl::StrCat("Attention, as far as the server allows it: ",
                       ::prefilld::wire::EnumNames<::prefill::v1::AttentionPolicy>(),
                       ". Empty: the server's default."));
// One for each field of prefill.v1.AttentionOptions, by its name; a test compares them.
ABSL_FLAG(std::optional<float>, gamma, std::nullopt,
          "Mass that a pattern must cover, (0, 1]. Named, it is --vertical_slash_gamma as well, "
          "unless that is named too.");
ABSL_FLAG(std::optional<float>, vertical_slash_gamma, std::nullopt,
          "--gamma of policy vertical_slash, whose columns and diagonals each reach it, (0, 1]. "
          "Absent: --gamma if that is named, else the server's.");
ABSL_FLAG(std::optional<float>, tau, std::nullopt, "Distance below which heads share, [0, 1].");
ABSL_FLAG(std::optional<float>, delta, std::nullopt,
          "Distance from uniform above which a head does not share, [0, 1]. 1: no such rule.");
ABSL_FLAG(std::optional<float>, coverage, std::nullopt,
          "A cluster shares when vertical-slash covers less of its pivot than this, [0, 1], or "
          "costs more.");
ABSL_FLAG(std::optional<float>, score_threshold, std::nullopt,
          "Part of each row's antidiagonal scores that the blocks of a scored head hold, (0, 1].");
ABSL_FLAG(std::optional<uint32_t>, score_stride, std::nullopt,
          "Tokens that antidiagonal scores take together: 8 or 16.");
ABSL_FLAG(std::optional<float>, last_rows_gamma, std::nullopt,
          "Mass of the columns, and of the diagonals, that the last queries add to a scored head's "
          "blocks, (0, 1].");
ABSL_FLAG(std::optional<uint32_t>, min_budget_tokens, std::nullopt,
          "Least number of columns, and of diagonals, that the last queries choose.");
ABSL_FLAG(std::optional<bool>, same_layer_sharing, std::nullopt,
          "Heads may share a pivot of their own layer.");
ABSL_FLAG(std::optional<float>, density, std::nullopt,
          "Share of the blocks that baseline_random computes, (0, 1].");
ABSL_FLAG(std::optional<uint32_t>, recall_audit_rows, std::nullopt,
          "Measure on so many query blocks per layer how much of the true attention mass the "
          "patterns hold. Not set: the server decides.");

ABSL_FLAG(uint32_t, block_tokens, 16, "prefill: tokens per KV block: 16, 32, 64 or 128.");
ABSL_FLAG(
    std::string, kv_order, "nhd",
    "prefill: order of the axes in a KV block: nhd, hnd, or with K and V of each head together "
    "nh2d, hn2d.");
ABSL_FLAG(std::string, kv_dtype, "",
          "prefill: bf16, fp16, fp32 or fp8_e4m3. Empty: the server's own.");
ABSL_FLAG(std::string, kv_scales, "",
          "prefill with --kv_dtype=fp8_e4m3: per_token or per_block. Empty: per_token.");
ABSL_FLAG(uint32_t, first_head, 0, "prefill: first KV head wanted.");
ABSL_FLAG(uint32_t, num_heads, 0, "prefill: number of KV heads wanted. 0: the rest.");
ABSL_FLAG(uint32_t, first_block, 0, "prefill: first KV block wanted.");
ABSL_FLAG(std::string, lanes, "auto",
          "prefill: connections for the KV, 1 to 16; auto: 4 for a long prompt, 1 for a short one. "
          "bench: connections that requests share. bench-kv: the numbers to measure, separated by "
          "commas; auto: 1,4,8.");
ABSL_FLAG(bool, layer_stats, false, "prefill: report every layer.");
ABSL_FLAG(bool, prompt_logprobs, false,
          "prefill: report how likely the model finds the prompt; the result waits for it.");
ABSL_FLAG(bool, bypass_prefix_cache, false,
          "prefill: compute all of the prompt, and leave nothing in the server's prefix cache.");
ABSL_FLAG(std::string, cache_salt, "",
          "prefill: the prompt shares cached prefixes with those of an equal salt alone.");
ABSL_FLAG(std::vector<std::string>, metadata, {},
          "Metadata that goes with the call, as key=value, comma-separated; "
          "x-tenant=search names a tenant to servers that trust you with it.");
ABSL_FLAG(
    std::string, token_file, "",
    "prefill, bench: file with a bearer token that tells the server whose requests these are. "
    "It goes over TLS or a Unix socket alone.");
ABSL_FLAG(bool, token_without_tls, false, "Send it in plain text as well.");
ABSL_FLAG(std::string, deliver_to, "",
          "prefill: have the KV pushed to this decode worker (host:port) instead of here.");
ABSL_FLAG(std::string, transfer_id, "", "prefill: the pushed_transfer_id it waits under.");

namespace prefilld::client {
namespace {

using ::google::protobuf::FieldDescriptor;
using process::Problems;

constexpr char kUsage[] =
    R"(Client of prefilld and its decode worker.

  prefill-cli generate --worker=HOST:PORT --model=DIR --text='Once'    prompt in, tokens out
  prefill-cli prefill  --server=HOST:PORT --token_ids_file=ids.json    prefill alone: KV received,
                                                                      verified and thrown away
  prefill-cli bench    --server=HOST:PORT --trace=requests.csv         sends requests at their times,
                                                                      whatever the server does
  prefill-cli bench-kv --server=HOST:PORT --peer=HOST:PORT             how fast KV comes, beside bare TCP,
                                                                      of prefilld --kv_bench_listen
  prefill-cli info     --server=HOST:PORT                              what a server runs
  prefill-cli health   --server=HOST:PORT --service=liveness           exits with 0 if it serves; of
                                                                      decode workers, too

A prompt is --text or --text_file (both need --model), --token_ids or --token_ids_file. A text is sent
as it is, without a chat template.
Generated tokens go to standard output, in the form of the prompt: text or ids. Progress, summary
and errors go to standard error.

Exit codes: 0 done; 1 the call failed; 2 bad arguments; 3 server unavailable; 4 the server is full,
try later; 130 interrupted.)";

template <typename T>
struct NamedValue {
  const char* name;
  T value;
};

template <typename T, size_t n>
T ReadName(const char* flag, const std::string& text, const NamedValue<T> (&names)[n],
           Problems& problems) {
  for (const auto& entry : names) {
    if (text == entry.name) return entry.value;
  }
  const std::string allowed = absl::StrJoin(
      names, ", ", [](std::string* out, const NamedValue<T>& e) { absl::StrAppend(out, e.name); });
  problems.push_back(absl::StrCat(flag, "=", text, " is not one of ", allowed));
  return T();
}

// The value of an enum of the contract. Empty text stands for UNSPECIFIED, the server's choice.
template <typename Enum>
Enum ReadEnum(const char* flag, const std::string& text, Problems& problems) {
  if (text.empty()) return Enum();
  const auto value = wire::EnumFromName<Enum>(text);
  if (!value.has_value()) {
    problems.push_back(absl::StrCat(flag, "=", text, " is not one of ", wire::EnumNames<Enum>()));
  }
  return value.value_or(Enum());
}

// The value of a flag that is an optional T and was given; nullopt for a flag of another type too.
template <typename T>
std::optional<T> Named(const absl::CommandLineFlag& flag) {
  return flag.TryGet<std::optional<T>>().value_or(std::nullopt);
}

Command ReadCommand(const std::vector<char*>& positional, Problems& problems) {
  constexpr NamedValue<Command> kCommands[] = {
      {"generate", Command::kGenerate}, {"prefill", Command::kPrefill},
      {"bench", Command::kBench},       {"bench-kv", Command::kBenchKv},
      {"info", Command::kInfo},         {"health", Command::kHealth}};
  if (positional.size() != 2) {
    problems.push_back(
        "one command is needed: generate, prefill, bench, bench-kv, info or health (see --help)");
    return Command::kInfo;
  }
  return ReadName("command", positional[1], kCommands, problems);
}

void CheckAddress(const char* flag, const std::string& address, Problems& problems) {
  process::AddIfAny(wire::DialAddressProblem(flag, address), problems);
}

std::vector<std::string> ReadAddresses(const char* flag, const std::string& text,
                                       Problems& problems) {
  std::vector<std::string> addresses = wire::SplitAddresses(text);
  if (addresses.empty()) problems.push_back(absl::StrCat(flag, " is empty"));
  for (const std::string& address : addresses) CheckAddress(flag, address, problems);
  return addresses;
}

ChannelOptions ReadChannel() {
  ChannelOptions channel;
  channel.use_proxy = absl::GetFlag(FLAGS_use_proxy);
  channel.token_file = absl::GetFlag(FLAGS_token_file);
  channel.token_without_tls = absl::GetFlag(FLAGS_token_without_tls);
  if (absl::GetFlag(FLAGS_tls)) {
    channel.tls = TlsOptions{absl::GetFlag(FLAGS_tls_ca), absl::GetFlag(FLAGS_tls_cert),
                             absl::GetFlag(FLAGS_tls_key), absl::GetFlag(FLAGS_tls_name)};
  }
  return channel;
}

PromptSource ReadPrompt(Command command, Problems& problems) {
  PromptSource prompt = {absl::GetFlag(FLAGS_text),      absl::GetFlag(FLAGS_text_file),
                         absl::GetFlag(FLAGS_token_ids), absl::GetFlag(FLAGS_token_ids_file),
                         absl::GetFlag(FLAGS_model),     absl::GetFlag(FLAGS_python),
                         absl::GetFlag(FLAGS_bos)};
  const int given = prompt.text.has_value() + prompt.text_file.has_value() +
                    prompt.token_ids.has_value() + prompt.token_ids_file.has_value();
  const bool needs_one = command == Command::kGenerate || command == Command::kPrefill;
  if (needs_one && given != 1) {
    problems.push_back(absl::StrCat(
        "one of --text, --text_file, --token_ids, --token_ids_file is needed; given are ", given));
  }
  return prompt;
}

::prefill::v1::AttentionOptions ReadAttention(Problems& problems) {
  ::prefill::v1::AttentionOptions attention;
  attention.set_policy(
      ReadEnum<::prefill::v1::AttentionPolicy>("--policy", absl::GetFlag(FLAGS_policy), problems));
  const google::protobuf::Reflection& values = *attention.GetReflection();
  for (int i = 0; i < attention.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = attention.GetDescriptor()->field(i);
    const absl::CommandLineFlag* flag = absl::FindCommandLineFlag(field->name());
    if (flag == nullptr) continue;
    if (const auto number = Named<float>(*flag)) values.SetFloat(&attention, field, *number);
    if (const auto count = Named<uint32_t>(*flag)) values.SetUInt32(&attention, field, *count);
    if (const auto yes = Named<bool>(*flag)) values.SetBool(&attention, field, *yes);
  }
  return attention;
}

::prefill::v1::Sampling ReadSampling() {
  ::prefill::v1::Sampling sampling;
  sampling.set_temperature(absl::GetFlag(FLAGS_temperature));
  sampling.set_top_k(absl::GetFlag(FLAGS_top_k));
  sampling.set_top_p(absl::GetFlag(FLAGS_top_p));
  sampling.set_seed(absl::GetFlag(FLAGS_seed));
  sampling.set_top_logprobs(absl::GetFlag(FLAGS_top_logprobs));
  return sampling;
}

::prefill::v1::KvLayoutRequest ReadLayout(Problems& problems) {
  ::prefill::v1::KvLayoutRequest layout;
  layout.set_block_tokens(absl::GetFlag(FLAGS_block_tokens));
  layout.set_order(
      ReadEnum<::prefill::v1::KvOrder>("--kv_order", absl::GetFlag(FLAGS_kv_order), problems));
  layout.set_dtype(
      ReadEnum<::prefill::v1::DType>("--kv_dtype", absl::GetFlag(FLAGS_kv_dtype), problems));
  layout.set_scales(
      ReadEnum<::prefill::v1::KvScales>("--kv_scales", absl::GetFlag(FLAGS_kv_scales), problems));
  layout.set_first_head(absl::GetFlag(FLAGS_first_head));
  layout.set_num_heads(absl::GetFlag(FLAGS_num_heads));
  layout.set_first_block(absl::GetFlag(FLAGS_first_block));
  return layout;
}

std::vector<uint32_t> ReadStopTokens(Problems& problems) {
  std::vector<uint32_t> ids;
  for (const std::string& text : absl::GetFlag(FLAGS_stop_token_ids)) {
    uint32_t id;
    if (absl::SimpleAtoi(text, &id)) {
      ids.push_back(id);
    } else {
      problems.push_back(absl::StrCat("--stop_token_ids: '", text, "' is no token id"));
    }
  }
  return ids;
}

// Returns the numbers of --lanes, none for auto.
std::vector<uint32_t> ReadLanes(Command command, Problems& problems) {
  const std::string text = absl::GetFlag(FLAGS_lanes);
  std::vector<uint32_t> numbers;
  if (text == "auto") return numbers;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    uint32_t number = 0;
    if (!absl::SimpleAtoi(part, &number) || number < 1 || number > kMaxLanes) {
      problems.push_back(absl::StrCat("--lanes=", text, " is neither auto nor 1 to ", kMaxLanes));
      return {};
    }
    numbers.push_back(number);
  }
  if (numbers.size() > 1 && command != Command::kBenchKv) {
    problems.push_back(absl::StrCat("--lanes=", text, ": several numbers are for bench-kv alone"));
  }
  return numbers;
}

Metadata ReadMetadata(Problems& problems) {
  Metadata metadata;
  for (const std::string& text : absl::GetFlag(FLAGS_metadata)) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) {
      problems.push_back(absl::StrCat("--metadata: '", text, "' is not key=value"));
    } else {
      metadata.emplace_back(text.substr(0, equals), text.substr(equals + 1));
    }
  }
  return metadata;
}

std::vector<const char*> AttentionFlags() {
  const auto& fields = *::prefill::v1::AttentionOptions::descriptor();
  std::vector<const char*> names;
  for (int i = 0; i < fields.field_count(); ++i) names.push_back(fields.field(i)->name().c_str());
  return names;
}

process::ProgramHelp Help() {
  return {.usage = kUsage,
          .groups = {{"Connection",
                      {"worker", "server", "use_proxy", "tls", "tls_ca", "tls_cert", "tls_key",
                       "tls_name", "timeout_s", "service"}},
                     {"Output", {"json", "quiet"}},
                     {"Prompt",
                      {"text", "text_file", "token_ids", "token_ids_file", "model", "python", "bos",
                       "request_id", "priority"}},
                     {"Generation",
                      {"max_new_tokens", "stop_token_ids", "ignore_eos", "temperature", "top_k",
                       "top_p", "seed", "top_logprobs", "pushed_transfer_id"}},
                     {"Attention", AttentionFlags()},
                     {"Prefill and its KV",
                      {"block_tokens", "kv_order", "kv_dtype", "kv_scales", "first_head",
                       "num_heads", "first_block", "lanes", "layer_stats", "prompt_logprobs",
                       "bypass_prefix_cache", "cache_salt", "metadata", "token_file",
                       "token_without_tls", "deliver_to", "transfer_id"}},
                     {"Load of bench", LoadFlags()},
                     {"Transfers of bench-kv", KvBenchFlags()}}};
}

}  // namespace

absl::StatusOr<CliOptions> OptionsFromCommandLine(int argc, char** argv) {
  return OptionsFromFlags(process::ParseCommandLine(argc, argv, Help()));
}

absl::StatusOr<CliOptions> OptionsFromFlags(const std::vector<char*>& positional) {
  Problems problems;
  CliOptions options;
  options.command = ReadCommand(positional, problems);
  options.workers = ReadAddresses("--worker", absl::GetFlag(FLAGS_worker), problems);
  options.servers = ReadAddresses("--server", absl::GetFlag(FLAGS_server), problems);
  options.channel = ReadChannel();
  const double timeout_s = absl::GetFlag(FLAGS_timeout_s);
  if (!(timeout_s >= 0)) problems.push_back("--timeout_s must not be negative");
  if (timeout_s > 0) options.timeout = absl::Seconds(timeout_s);
  options.json = absl::GetFlag(FLAGS_json);
  options.quiet = absl::GetFlag(FLAGS_quiet);
  options.service = absl::GetFlag(FLAGS_service);
  options.prompt = ReadPrompt(options.command, problems);
  options.request_id = absl::GetFlag(FLAGS_request_id);
  options.priority = absl::GetFlag(FLAGS_priority);
  options.attention = ReadAttention(problems);
  options.sampling = ReadSampling();
  const int32_t max_new_tokens = absl::GetFlag(FLAGS_max_new_tokens);
  if (max_new_tokens < 1) problems.push_back("--max_new_tokens must be at least 1");
  options.max_new_tokens = static_cast<uint32_t>(max_new_tokens);
  options.stop_token_ids = ReadStopTokens(problems);
  options.ignore_eos = absl::GetFlag(FLAGS_ignore_eos);
  options.pushed_transfer_id = absl::GetFlag(FLAGS_pushed_transfer_id);
  options.layout = ReadLayout(problems);
  const std::vector<uint32_t> lanes = ReadLanes(options.command, problems);
  if (lanes.size() == 1) options.lanes = lanes.front();
  options.layer_stats = absl::GetFlag(FLAGS_layer_stats);
  options.prompt_logprobs = absl::GetFlag(FLAGS_prompt_logprobs);
  options.prefix_cache.set_bypass(absl::GetFlag(FLAGS_bypass_prefix_cache));
  options.prefix_cache.set_salt(absl::GetFlag(FLAGS_cache_salt));
  options.metadata = ReadMetadata(problems);
  options.deliver_to = absl::GetFlag(FLAGS_deliver_to);
  options.transfer_id = absl::GetFlag(FLAGS_transfer_id);
  options.bench = ReadLoad(options.command == Command::kBench, problems);
  options.kv_bench = ReadKvBench(options.command == Command::kBenchKv, problems);
  if (!lanes.empty()) options.kv_bench.lanes = lanes;
  if (!options.deliver_to.empty()) CheckAddress("--deliver_to", options.deliver_to, problems);
  if (options.deliver_to.empty() != options.transfer_id.empty()) {
    problems.push_back("--deliver_to and --transfer_id belong together");
  }
  PREFILLD_RETURN_IF_ERROR(process::ToStatus(problems));
  return options;
}

}  // namespace prefilld::client
