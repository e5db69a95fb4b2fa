#include "client/decode_worker/options.h"

#include <limits>
#include <optional>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/lane_choice.h"
#include "proto/process/command_line.h"
#include "proto/process/problems.h"
#include "proto/status_macros.h"
#include "proto/wire/host_port.h"
#include "proto/wire/kv_layout.h"

ABSL_FLAG(std::string, model, "", "Checkpoint folder, the same as prefilld's. Required.");
ABSL_FLAG(std::vector<std::string>, ignore_config, {},
          "Fields of config.json to treat as absent, comma-separated; those of a nested object as "
          "rope_scaling.finetuned. For a field that is refused but changes nothing in this model. "
          "prefilld "
          "needs the same.");
ABSL_FLAG(std::string, device, "auto", "auto, cpu or cuda.");
ABSL_FLAG(int32_t, cpu_threads, 0, "Compute threads of the CPU device. 0: all cores.");
ABSL_FLAG(int32_t, kv_block_tokens, 16, "Tokens per KV block: 16, 32, 64 or 128.");
ABSL_FLAG(std::string, kv_order, "nhd", "Order of the axes in a KV block: nhd or hnd.");
ABSL_FLAG(
    std::string, kv_dtype, "native",
    "What the cache is sent in. native: what the pool holds, bf16 on a GPU and fp32 on a CPU. "
    "fp8_e4m3: about half the bytes of bf16; it becomes the pool's type here, rounded.");
ABSL_FLAG(
    std::string, kv_scales, "per_token",
    "Scales of --kv_dtype=fp8_e4m3: one for each token and head (per_token), or for each block "
    "and head (per_block), which is less exact.");
ABSL_FLAG(int64_t, kv_pool_tokens, 32768,
          "Tokens whose KV fits in memory, over all requests; reserved at start.");

ABSL_FLAG(std::string, port_file, "",
          "File to write 'grpc=<port>' and 'metrics=<port>' to once the worker is ready.");
ABSL_FLAG(
    std::string, listen, "0.0.0.0:50052",
    "host:port of the gRPC services, IPv6 as [::]:50052. Port 0: any. Or unix:/path, for pods "
    "of the same node. Several, separated by commas, are served all.");
ABSL_FLAG(std::string, metrics_listen, "",
          "host:port of the Prometheus endpoint (/metrics), IPv6 as [::]:9464. It has no TLS: bind "
          "it to an address that only Prometheus reaches. Empty: none.");

ABSL_FLAG(std::string, tls_cert, "", "PEM certificate chain of the worker. Empty: plain text.");
ABSL_FLAG(std::string, tls_key, "", "PEM private key of --tls_cert.");
ABSL_FLAG(std::string, tls_client_ca, "",
          "PEM certificates that sign callers. Set: callers must present a certificate.");

ABSL_FLAG(std::vector<std::string>, prefill_address, {"localhost:50051"},
          "host:port of prefilld, or unix:/path on the same node. Several, separated by commas, "
          "take the requests in turn, and those that cannot be reached are left out. Empty: only "
          "caches that are pushed here.");
ABSL_FLAG(bool, use_proxy, false,
          "Connect to prefilld through the HTTP proxy that grpc_proxy, https_proxy or http_proxy "
          "names. Otherwise these variables are ignored.");
ABSL_FLAG(bool, prefill_tls, false, "Connect to prefilld with TLS.");
ABSL_FLAG(std::string, prefill_tls_ca, "",
          "PEM certificates that sign prefilld's. Empty: the system's.");
ABSL_FLAG(std::string, prefill_tls_cert, "", "PEM certificate to show to prefilld (mutual TLS).");
ABSL_FLAG(std::string, prefill_tls_key, "", "PEM private key of --prefill_tls_cert.");
ABSL_FLAG(std::string, prefill_tls_name, "",
          "Name to verify in prefilld's certificate. Empty: the host of --prefill_address.");
ABSL_FLAG(
    std::string, prefill_token_file, "",
    "File with a bearer token that tells prefilld whose requests these are, read again when it "
    "changes. It goes over TLS or a Unix socket alone. Empty: none.");
ABSL_FLAG(bool, prefill_token_without_tls, false, "Send it in plain text as well.");
ABSL_FLAG(std::string, lanes, "auto",
          "Connections per KV transfer, 1 to 16. auto: 4 for a long prompt, 1 for a short one.");

ABSL_FLAG(int64_t, max_connections, 1024,
          "Connections that may be open; more are refused. Lowered to what the limit of open files "
          "(ulimit -n) allows, of which each takes two.");
ABSL_FLAG(std::string, log_format, "text", "text (key=value) or json, one event per line.");

ABSL_FLAG(int64_t, max_new_tokens_limit, 4096, "Greatest max_new_tokens a request may ask for.");
ABSL_FLAG(int32_t, max_requests, 64, "Requests at once, those waiting for prefill included.");
ABSL_FLAG(double, transfer_timeout_s, 120,
          "A request that waits for a pushed cache ends when nothing came for so long.");
ABSL_FLAG(
    double, push_resume_window_s, 10,
    "A pushed cache whose sender lost a connection is kept for so long, for the sender to come "
    "back. At least as long as prefilld's --resume_window_s. 0: the push ends.");
ABSL_FLAG(
    double, stall_timeout_s, 30,
    "A caller that takes nothing, or opens a push and sends nothing, for so long is cut off.");
ABSL_FLAG(double, drain_timeout_s, 25,
          "After SIGTERM accepted requests get so long to finish. Less than the orchestrator's "
          "grace period.");

namespace prefilld::client {
namespace {

using process::AddIfAny;
using process::CheckRange;
using process::CheckSeconds;
using process::Problems;

process::ProgramHelp Help() {
  process::ProgramHelp help;
  help.usage = "Reference decode worker of prefilld. prefilld-decode-worker --model=DIR [flags]";
  help.groups = {{"Model and KV memory",
                  {"model", "ignore_config", "device", "cpu_threads", "kv_block_tokens", "kv_order",
                   "kv_pool_tokens"}},
                 {"prefilld",
                  {"prefill_address", "use_proxy", "prefill_tls", "prefill_tls_ca",
                   "prefill_tls_cert", "prefill_tls_key", "prefill_tls_name", "prefill_token_file",
                   "prefill_token_without_tls", "lanes", "kv_dtype", "kv_scales"}},
                 {"Addresses, TLS and log",
                  {"listen", "metrics_listen", "port_file", "tls_cert", "tls_key", "tls_client_ca",
                   "log_format"}},
                 {"Limits and time-outs",
                  {"max_connections", "max_new_tokens_limit", "max_requests", "transfer_timeout_s",
                   "push_resume_window_s", "stall_timeout_s", "drain_timeout_s"}}};
  return help;
}

void CheckAddresses(const WorkerOptions& options, Problems& problems) {
  for (const std::string& address : wire::SplitAddresses(options.listen)) {
    AddIfAny(wire::ListenOrUnixProblem("--listen", address), problems);
  }
  if (!options.metrics_listen.empty()) {
    AddIfAny(wire::ListenAddressProblem("--metrics_listen", options.metrics_listen), problems);
  }
  for (const std::string& address : options.prefill_addresses) {
    AddIfAny(wire::DialAddressProblem("--prefill_address", address), problems);
  }
}

absl::Duration ReadSeconds(const char* flag, double seconds, Problems& problems) {
  CheckSeconds(flag, absl::Seconds(seconds), 86400, problems);
  return absl::Seconds(seconds);
}

// Returns 0 for auto.
uint32_t ReadLanes(Problems& problems) {
  const std::string text = absl::GetFlag(FLAGS_lanes);
  uint32_t lanes = 0;
  if (text == "auto") return lanes;
  if (!absl::SimpleAtoi(text, &lanes) || lanes < 1 || lanes > kMaxLanes) {
    problems.push_back(absl::StrCat("--lanes=", text, " is neither auto nor 1 to ", kMaxLanes));
  }
  return lanes;
}

WireKv ReadWireKv(Problems& problems) {
  const std::string dtype = absl::GetFlag(FLAGS_kv_dtype);
  const std::string scales = absl::GetFlag(FLAGS_kv_scales);
  const bool is_fp8 = dtype == "fp8_e4m3";
  if (!is_fp8 && dtype != "native") {
    problems.push_back(absl::StrCat("--kv_dtype=", dtype, " is not one of native, fp8_e4m3"));
  }
  if (scales != "per_token" && scales != "per_block") {
    problems.push_back(absl::StrCat("--kv_scales=", scales, " is not one of per_token, per_block"));
  } else if (scales == "per_block" && !is_fp8) {
    problems.push_back("--kv_scales=per_block needs --kv_dtype=fp8_e4m3");
  }
  if (!is_fp8) return WireKv::kAsCached;
  return scales == "per_block" ? WireKv::kFp8PerBlock : WireKv::kFp8PerToken;
}

// Returns the flags that say so.
std::pair<std::string, std::string> FlagsOf(WireKv wire_kv) {
  switch (wire_kv) {
    case WireKv::kFp8PerToken:
      return {"fp8_e4m3", "per_token"};
    case WireKv::kFp8PerBlock:
      return {"fp8_e4m3", "per_block"};
    case WireKv::kAsCached:
      break;
  }
  return {"native", "none"};
}

model::DecoderOptions ReadDecoder(Problems& problems) {
  model::DecoderOptions decoder;
  decoder.checkpoint_dir = absl::GetFlag(FLAGS_model);
  decoder.overruled_config_keys = absl::GetFlag(FLAGS_ignore_config);
  if (decoder.checkpoint_dir.empty()) problems.push_back("--model is required");

  const std::string device = absl::GetFlag(FLAGS_device);
  if (device == "cpu") {
    decoder.device = model::DeviceChoice::kCpu;
  } else if (device == "cuda") {
    decoder.device = model::DeviceChoice::kCuda;
  } else if (device != "auto") {
    problems.push_back(absl::StrCat("--device=", device, " is not one of auto, cpu, cuda"));
  }
  decoder.cpu_threads = absl::GetFlag(FLAGS_cpu_threads);
  CheckRange("--cpu_threads", decoder.cpu_threads, 0, 4096, problems);

  decoder.block_tokens = absl::GetFlag(FLAGS_kv_block_tokens);
  if (!wire::IsBlockTokens(decoder.block_tokens)) {
    problems.push_back(absl::StrCat("--kv_block_tokens=", decoder.block_tokens, " is not one of ",
                                    wire::kBlockTokensList));
  }
  const std::string order = absl::GetFlag(FLAGS_kv_order);
  if (order == "hnd") {
    decoder.order = kernels::KvOrder::kHnd;
  } else if (order != "nhd") {
    problems.push_back(absl::StrCat("--kv_order=", order, " is not one of nhd, hnd"));
  }
  decoder.pool_tokens = absl::GetFlag(FLAGS_kv_pool_tokens);
  CheckRange("--kv_pool_tokens", decoder.pool_tokens, 128, int64_t{1} << 28, problems);
  return decoder;
}

process::LogFormat ReadLogFormat(Problems& problems) {
  const std::string format = absl::GetFlag(FLAGS_log_format);
  if (format != "text" && format != "json") {
    problems.push_back(absl::StrCat("--log_format=", format, " is not one of text, json"));
  }
  return format == "json" ? process::LogFormat::kJson : process::LogFormat::kText;
}

wire::ChannelOptions ReadPrefill(Problems& problems) {
  wire::ChannelOptions prefill;
  prefill.use_proxy = absl::GetFlag(FLAGS_use_proxy);
  prefill.token_file = absl::GetFlag(FLAGS_prefill_token_file);
  prefill.token_without_tls = absl::GetFlag(FLAGS_prefill_token_without_tls);
  const wire::ChannelTls tls = {
      absl::GetFlag(FLAGS_prefill_tls_ca), absl::GetFlag(FLAGS_prefill_tls_cert),
      absl::GetFlag(FLAGS_prefill_tls_key), absl::GetFlag(FLAGS_prefill_tls_name)};
  if (absl::GetFlag(FLAGS_prefill_tls)) {
    prefill.tls = tls;
  } else if (!tls.ca_file.empty() || !tls.cert_file.empty() || !tls.key_file.empty() ||
             !tls.server_name.empty()) {
    problems.push_back("--prefill_tls_ca, _cert, _key and _name need --prefill_tls");
  }
  return prefill;
}

}  // namespace

absl::StatusOr<WorkerOptions> OptionsFromCommandLine(int argc, char** argv) {
  const std::vector<char*> positional = process::ParseCommandLine(argc, argv, Help());
  Problems problems;
  for (size_t i = 1; i < positional.size(); ++i) {
    problems.push_back(absl::StrCat("argument '", positional[i], "' is not a flag"));
  }
  WorkerOptions options;
  options.decoder = ReadDecoder(problems);
  options.listen = absl::GetFlag(FLAGS_listen);
  options.tls = {absl::GetFlag(FLAGS_tls_cert), absl::GetFlag(FLAGS_tls_key),
                 absl::GetFlag(FLAGS_tls_client_ca)};
  wire::CheckServerTls(options.tls, problems);
  options.metrics_listen = absl::GetFlag(FLAGS_metrics_listen);
  options.port_file = absl::GetFlag(FLAGS_port_file);
  options.log_format = ReadLogFormat(problems);
  options.prefill = ReadPrefill(problems);
  options.prefill_addresses = absl::GetFlag(FLAGS_prefill_address);
  options.lanes = ReadLanes(problems);
  options.wire_kv = ReadWireKv(problems);
  options.max_connections = absl::GetFlag(FLAGS_max_connections);
  CheckRange("--max_connections", options.max_connections, 1, 1 << 20, problems);
  options.max_new_tokens_limit = absl::GetFlag(FLAGS_max_new_tokens_limit);
  CheckRange("--max_new_tokens_limit", options.max_new_tokens_limit, 1,
             std::numeric_limits<int32_t>::max(), problems);
  options.max_requests = absl::GetFlag(FLAGS_max_requests);
  CheckRange("--max_requests", options.max_requests, 1, 4096, problems);
  options.transfer_timeout =
      ReadSeconds("--transfer_timeout_s", absl::GetFlag(FLAGS_transfer_timeout_s), problems);
  if (const double window = absl::GetFlag(FLAGS_push_resume_window_s); window != 0) {
    options.push_resume_window = ReadSeconds("--push_resume_window_s", window, problems);
  } else {
    options.push_resume_window = absl::ZeroDuration();
  }
  options.stall_timeout =
      ReadSeconds("--stall_timeout_s", absl::GetFlag(FLAGS_stall_timeout_s), problems);
  options.drain_timeout =
      ReadSeconds("--drain_timeout_s", absl::GetFlag(FLAGS_drain_timeout_s), problems);
  CheckAddresses(options, problems);
  PREFILLD_RETURN_IF_ERROR(process::ToStatus(problems));
  return options;
}

std::vector<std::pair<std::string, std::string>> Describe(const WorkerOptions& o) {
  return {{"model", o.decoder.checkpoint_dir},
          {"ignore_config", absl::StrJoin(o.decoder.overruled_config_keys, ",")},
          {"listen", o.listen},
          {"tls", o.tls.mode()},
          {"metrics_listen", o.metrics_listen},
          {"prefill_address", absl::StrJoin(o.prefill_addresses, ",")},
          {"use_proxy", o.prefill.use_proxy ? "yes" : "no"},
          {"prefill_tls", o.prefill.tls ? "on" : "off"},
          {"prefill_token_file", o.prefill.token_file},
          {"lanes", o.lanes == 0 ? "auto" : absl::StrCat(o.lanes)},
          {"kv_dtype", FlagsOf(o.wire_kv).first},
          {"kv_scales", FlagsOf(o.wire_kv).second},
          {"kv_block_tokens", absl::StrCat(o.decoder.block_tokens)},
          {"kv_order", o.decoder.order == kernels::KvOrder::kNhd ? "nhd" : "hnd"},
          {"kv_pool_tokens", absl::StrCat(o.decoder.pool_tokens)},
          {"max_connections", absl::StrCat(o.max_connections)},
          {"max_new_tokens_limit", absl::StrCat(o.max_new_tokens_limit)},
          {"max_requests", absl::StrCat(o.max_requests)},
          {"transfer_timeout", absl::FormatDuration(o.transfer_timeout)},
          {"push_resume_window", absl::FormatDuration(o.push_resume_window)},
          {"stall_timeout", absl::FormatDuration(o.stall_timeout)},
          {"drain_timeout", absl::FormatDuration(o.drain_timeout)}};
}

}  // namespace prefilld::client
