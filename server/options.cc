#include "server/options.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <variant>

#include "absl/flags/flag.h"
#include "absl/flags/reflection.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "model/sparse/attention_options.h"
#include "proto/process/command_line.h"
#include "proto/process/problems.h"
#include "proto/status_macros.h"

// Thresholds' help comes from their table.
using ::prefilld::model::ThresholdHelp;
using ::prefilld::model::ThresholdNamed;

ABSL_FLAG(std::string, model, "", "Checkpoint folder (config.json, *.safetensors). Required.");
ABSL_FLAG(std::vector<std::string>, ignore_config, {},
          "Fields of config.json to treat as absent, comma-separated; those of a nested object as "
          "rope_scaling.finetuned. For a field that is refused but changes nothing in this model. "
          "The decode "
          "worker needs the same.");
ABSL_FLAG(std::string, clusters, "",
          "Head-cluster file. Empty: head_clusters.json of the checkpoint folder, if there.");
ABSL_FLAG(std::string, device, "auto", "auto, cpu or cuda.");
ABSL_FLAG(int32_t, cpu_threads, 0, "Compute threads of the CPU device. 0: all cores.");
ABSL_FLAG(int64_t, max_prompt_tokens, 0,
          "Longest prompt accepted. Memory is reserved at start for one, or for --max_batch_tokens "
          "if those are more. 0: the model's limit, at most 131072.");

ABSL_FLAG(
    std::optional<int64_t>, max_batch_tokens, std::nullopt,
    "Short prompts that wait are computed together, at most so many tokens at once, each "
    "rounded up to 128 and an eighth of this at most; 0: one by one. Memory is reserved at "
    "start for so many, or for --max_prompt_tokens if those are more. Not set: 2048 on a GPU, "
    "0 on the CPU, where it gains nothing. On an H200 and a model of 7B 16 prompts of 128 tokens "
    "go through 1.9 times as fast together, of 512 only 1.11 times, and as each waits for the "
    "whole pass, the mean time to the first token of those grows from 102 to 172 ms.");

ABSL_FLAG(
    int64_t, max_resident_tokens, 0,
    "Tokens that all prompts under way may have together. Memory for their states is reserved "
    "at start: for one of --max_prompt_tokens, then for short ones, then for more long ones. "
    "At least --max_prompt_tokens and --max_batch_tokens. 0: on a GPU four short ones of 8192 "
    "tokens, two of the greatest length and two of at most 131072, of which all but one only if "
    "they fit; on the CPU two of 4096 and one of the greatest length.");

ABSL_FLAG(
    int64_t, prefix_cache_bytes, 0,
    "Host memory that keeps the KV of prompts for later ones that begin with the same tokens, "
    "which then compute the rest alone. Reserved at start, pinned on a GPU. 0: none.");
ABSL_FLAG(
    std::string, prefix_cache_reuse, "looser",
    "Requests that sparsely computed KV of the prefix cache serves. looser: those of the same "
    "policy with the same or looser thresholds, and densely computed KV serves all. equal: "
    "those of the same policy and thresholds alone, for dense KV too.");

ABSL_FLAG(
    std::vector<std::string>, cache_watchers, {},
    "Who may follow which blocks the prefix cache holds (WatchPrefixCache): names of tenants, "
    "comma-separated, or all. They see keys, by which guesses of prompts can be tested: name "
    "your router alone. Empty: nobody.");
ABSL_FLAG(bool, cache_watch_tokens, false,
          "They may also see the tokens of blocks, unless a prompt has a salt or a tenant.");

ABSL_FLAG(std::optional<int64_t>, max_graph_tokens, std::nullopt,
          "Dense prompts of up to so many tokens, and batches of them, are padded to a multiple of "
          "128, and their layers recorded the second time such a length is met and replayed from "
          "then on (CUDA graphs); at most 4096, 0: never. Not set: 2048 on a GPU.");

ABSL_FLAG(
    std::string, listen, "0.0.0.0:50051",
    "host:port of the gRPC services, IPv6 as [::]:50051. Port 0: any. Or unix:/path, for pods "
    "of the same node. Several, separated by commas, are served all.");
ABSL_FLAG(std::string, metrics_listen, "0.0.0.0:9464",
          "host:port of the Prometheus endpoint (/metrics), IPv6 as [::]:9464. It has no TLS: bind "
          "it to an address that only Prometheus reaches. Empty: none.");
ABSL_FLAG(std::string, port_file, "",
          "File to write 'grpc=<port>' and 'metrics=<port>' to once the server is ready.");
ABSL_FLAG(std::string, tls_cert, "",
          "PEM certificate chain of the server; pushes show it to their receivers, too, so where "
          "those ask for one it must be valid for clients. Empty: plain text, pushes included.");
ABSL_FLAG(std::string, tls_key, "", "PEM private key of --tls_cert.");
ABSL_FLAG(std::string, tls_client_ca, "",
          "PEM certificates that sign clients, and the receivers of pushes. Set: clients must "
          "present a certificate. Empty: pushes trust the system's certificates.");
ABSL_FLAG(std::string, log_format, "text", "text (key=value) or json, one event per line.");

ABSL_FLAG(std::optional<std::string>, policy, std::nullopt,
          absl::StrCat("Default attention: ",
                       prefilld::model::PolicyNames(prefilld::model::PoliciesForServing()),
                       ". Not set: auto. The thresholds below, not set, are the head-cluster "
                       "file's, else the built-in ones."));
ABSL_FLAG(std::vector<std::string>, allowed_policies, {},
          absl::StrCat("Policies that requests may ask for, comma-separated, among ",
                       prefilld::model::AllPolicyNames(),
                       ". Empty: all but the baselines, which are for evaluations."));
// One for each threshold that an operator may set; a test compares them with the table.
ABSL_FLAG(std::optional<float>, gamma, std::nullopt, ThresholdHelp(ThresholdNamed("gamma")));
ABSL_FLAG(std::optional<float>, vertical_slash_gamma, std::nullopt,
          ThresholdHelp(ThresholdNamed("vertical_slash_gamma")));
ABSL_FLAG(std::optional<float>, tau, std::nullopt, ThresholdHelp(ThresholdNamed("tau")));
ABSL_FLAG(std::optional<float>, delta, std::nullopt, ThresholdHelp(ThresholdNamed("delta")));
ABSL_FLAG(std::optional<float>, coverage, std::nullopt, ThresholdHelp(ThresholdNamed("coverage")));
ABSL_FLAG(std::optional<float>, score_threshold, std::nullopt,
          ThresholdHelp(ThresholdNamed("score_threshold")));
ABSL_FLAG(std::optional<int64_t>, score_stride, std::nullopt,
          ThresholdHelp(ThresholdNamed("score_stride")));
ABSL_FLAG(std::optional<float>, last_rows_gamma, std::nullopt,
          ThresholdHelp(ThresholdNamed("last_rows_gamma")));
ABSL_FLAG(std::optional<int64_t>, min_budget_tokens, std::nullopt,
          ThresholdHelp(ThresholdNamed("min_budget_tokens")));
ABSL_FLAG(std::optional<int64_t>, crossover_tokens, std::nullopt,
          ThresholdHelp(ThresholdNamed("crossover_tokens")));
ABSL_FLAG(double, recall_audit_fraction, 0,
          "Share of the requests whose recall is measured, [0, 1]: how much of the true attention "
          "mass the patterns hold.");
ABSL_FLAG(
    int64_t, recall_audit_rows, 8,
    "Query blocks per layer that such a measurement looks at, and the most that a request may "
    "ask for; each takes about 128 / tokens of the time of dense attention. 0: none.");

ABSL_FLAG(int64_t, max_connections, 1024,
          "Connections that may be open; more are refused. Lowered to what the limit of open files "
          "(ulimit -n) allows, of which each takes two.");
ABSL_FLAG(int64_t, queue_capacity, 64, "Requests that may wait behind those that run.");
ABSL_FLAG(int64_t, max_queued_tokens, 0,
          "Prompt tokens that may wait. 0: eight prompts of the greatest length.");
ABSL_FLAG(
    std::string, scheduling, "turns",
    "Who computes next. turns: by class, tenant and remaining time, layer by layer. fifo: first "
    "come, first served, each prompt to its end, for comparisons; short prompts still share "
    "passes.");
ABSL_FLAG(
    std::string, tenant_from, "none",
    "How callers are told apart: none, by the name in their certificate (certificate; the "
    "common name, else the first alternative name), by metadata that a gateway sets which "
    "you trust (metadata), or by a bearer token (token). Tenants share the device by weight.");
ABSL_FLAG(std::string, tenant_metadata_key, "x-tenant",
          "Key of that metadata. Nobody but the gateway may be able to set it.");
ABSL_FLAG(std::string, tenants, "",
          "JSON file with the tenants: weights, limits, tokens (deploy/README.md). Empty: one for "
          "all callers, without limits. It is read again when it changes, and on SIGHUP.");

ABSL_FLAG(int32_t, max_lanes, 16, "Parallel KV streams one request may use, 1 to 16.");
ABSL_FLAG(int64_t, staging_bytes, int64_t{256} << 20,
          "Host memory for KV on its way to consumers; one request takes at most half.");
ABSL_FLAG(
    int64_t, shared_memory_bytes, int64_t{4} << 30,
    "Memory that consumers of this host bring for their KV and that is mapped here, and pinned for "
    "a GPU, at once. It counts as theirs, so this bounds address space and what cannot be swapped. "
    "One with four lanes brings 40 MiB; beyond the limit KV goes over gRPC. 0: all of it does.");
ABSL_FLAG(
    std::string, shared_memory_dir, "",
    "Folder with a socket for consumers in other pods of the node, which have the folder at the "
    "same path; nobody else may write there. Empty: processes of the same pod, or network "
    "namespace, alone.");
ABSL_FLAG(int64_t, frame_bytes, int64_t{2} << 20, "KV payload of one message, 1 to 4 MiB.");
ABSL_FLAG(int32_t, pack_threads, 0,
          "Threads that pack, sum up and send KV of all requests. 0: half of the cores, 1 to 8.");
ABSL_FLAG(std::string, kv_bench_listen, "",
          "host:port at which `prefill-cli bench-kv` measures bare TCP. Set: this process serves "
          "made-up KV and has no model. Empty: off.");
ABSL_FLAG(
    std::vector<std::string>, deliver_to_allow, {},
    "Patterns of addresses that requests may have their KV pushed to, comma-separated. "
    "10.2.*.*:50052 and [fd00::*]:50052 are for requests that name a numeric address, '*' "
    "stands for any number; *.decode.svc:50052 is for names, whose owners decide where they lead: "
    "use domains of yours alone. unix:/run/decode/*.sock. Empty: push is off.");
ABSL_FLAG(bool, use_proxy, false,
          "Pushes go through the HTTP proxy that grpc_proxy, https_proxy or http_proxy names. "
          "Otherwise these variables are ignored.");
ABSL_FLAG(double, stall_timeout_s, 30, "A consumer that takes nothing for so long is cut off.");
ABSL_FLAG(
    double, min_consumer_mb_per_s, 50,
    "A consumer that is slower, measured while it has KV to take and beyond its first "
    "--stall_timeout_s, is cut off when other requests wait for its memory. Lower it on links "
    "below 400 Mbit/s. 0: as slow as it likes.");
ABSL_FLAG(
    double, resume_window_s, 10,
    "A request whose caller asked for it (resume_key) waits for so long when its connection "
    "breaks, and keeps what was sent and is not acknowledged in staging memory; up to 64 "
    "requests in half of --staging_bytes. 0: it ends at once. A push does so for its receiver, "
    "unasked.");
ABSL_FLAG(double, wedge_timeout_s, 300,
          "Liveness fails when no layer and no frame gets done for so long though work waits. "
          "More than the longest layer takes, and more than --stall_timeout_s.");
ABSL_FLAG(double, drain_timeout_s, 25,
          "After SIGTERM accepted requests get so long to finish. Less than the orchestrator's "
          "grace period.");

namespace prefilld::server {
namespace {

// A prompt of the greatest usual length stores a thousand blocks, and as many make room.
constexpr int64_t kCacheEvents = 16384;

bool IsDeviceName(absl::string_view name) {
  return name == "auto" || name == "cpu" || name == "cuda";
}

model::DeviceChoice DeviceFromName(absl::string_view name) {
  if (name == "cpu") return model::DeviceChoice::kCpu;
  if (name == "cuda") return model::DeviceChoice::kCuda;
  return model::DeviceChoice::kAuto;
}

// Reads the flags that take a word out of a fixed set. A word outside of it is a problem here; the
// other checks are made by Validate.
void ReadNamedValues(ServerOptions& options, std::vector<std::string>& problems) {
  const std::string device = absl::GetFlag(FLAGS_device);
  if (!IsDeviceName(device)) {
    problems.push_back(absl::StrCat("--device=", device, " is not one of auto, cpu, cuda"));
  }
  options.engine.device = DeviceFromName(device);

  const std::string format = absl::GetFlag(FLAGS_log_format);
  if (format != "text" && format != "json") {
    problems.push_back(absl::StrCat("--log_format=", format, " is not one of text, json"));
  }
  const std::string scheduling = absl::GetFlag(FLAGS_scheduling);
  if (scheduling != "turns" && scheduling != "fifo") {
    problems.push_back(absl::StrCat("--scheduling=", scheduling, " is not one of turns, fifo"));
  }
  options.scheduling = scheduling == "fifo" ? Scheduling::kFifo : Scheduling::kTurns;
  const std::string source = absl::GetFlag(FLAGS_tenant_from);
  if (const auto known = ParseTenantSource(source); known.has_value()) {
    options.tenant_evidence.source = *known;
  } else {
    problems.push_back(absl::StrCat("--tenant_from=", source,
                                    " is not one of none, certificate, metadata, token"));
  }

  options.log_format = format == "json" ? process::LogFormat::kJson : process::LogFormat::kText;

  const std::string reuse = absl::GetFlag(FLAGS_prefix_cache_reuse);
  if (const auto rule = model::ParsePrefixReuseRule(reuse); rule.has_value()) {
    options.engine.prefix_reuse = *rule;
  } else {
    problems.push_back(absl::StrCat("--prefix_cache_reuse=", reuse, " is not one of ",
                                    model::kPrefixReuseRuleNames));
  }

  const std::string policies = model::AllPolicyNames();
  if (const auto name = absl::GetFlag(FLAGS_policy); name.has_value()) {
    options.attention.policy = model::ParsePolicy(*name);
    if (!options.attention.policy.has_value()) {
      problems.push_back(absl::StrCat("--policy=", *name, " is not one of ", policies));
    }
  }
  const std::vector<std::string> allowed = absl::GetFlag(FLAGS_allowed_policies);
  if (!allowed.empty()) options.allowed_policies.clear();
  for (const std::string& name : allowed) {
    if (const auto policy = model::ParsePolicy(name); policy.has_value()) {
      options.allowed_policies.push_back(*policy);
    } else {
      problems.push_back(absl::StrCat("--allowed_policies: '", name, "' is not one of ", policies));
    }
  }
  options.engine.baselines = std::any_of(options.allowed_policies.begin(),
                                         options.allowed_policies.end(), model::IsBaseline);
}

// A flag has the threshold's name and is an optional of its type.
void ReadThresholds(model::AttentionOverrides& overrides) {
  for (const model::AttentionThreshold& threshold : model::kAttentionThresholds) {
    if ((threshold.setters & model::kOperator) == 0) continue;
    const absl::CommandLineFlag* flag = absl::FindCommandLineFlag(threshold.name);
    if (flag == nullptr) continue;
    std::visit(
        [&](const auto& members) {
          using T = typename std::decay_t<decltype(members)>::Value;
          overrides.*members.named = flag->TryGet<std::optional<T>>().value_or(std::nullopt);
        },
        threshold.members);
  }
}

ServerOptions ReadPlainValues() {
  ServerOptions options;
  options.engine.checkpoint_dir = absl::GetFlag(FLAGS_model);
  options.engine.overruled_config_keys = absl::GetFlag(FLAGS_ignore_config);
  options.engine.clusters_path = absl::GetFlag(FLAGS_clusters);
  options.engine.cpu_threads = absl::GetFlag(FLAGS_cpu_threads);
  options.engine.max_tokens = absl::GetFlag(FLAGS_max_prompt_tokens);
  options.engine.max_batch_tokens = absl::GetFlag(FLAGS_max_batch_tokens);
  options.engine.max_graph_tokens = absl::GetFlag(FLAGS_max_graph_tokens);
  options.engine.max_resident_tokens = absl::GetFlag(FLAGS_max_resident_tokens);
  options.engine.measure_layers = true;
  options.engine.prefix_cache_bytes = absl::GetFlag(FLAGS_prefix_cache_bytes);
  options.cache_watch.watchers = absl::GetFlag(FLAGS_cache_watchers);
  options.cache_watch.tokens = absl::GetFlag(FLAGS_cache_watch_tokens);
  if (!options.cache_watch.watchers.empty()) options.engine.prefix_cache_events = kCacheEvents;
  ReadThresholds(options.attention);
  options.recall_audit.fraction = absl::GetFlag(FLAGS_recall_audit_fraction);
  options.recall_audit.rows = absl::GetFlag(FLAGS_recall_audit_rows);
  options.listen = absl::GetFlag(FLAGS_listen);
  options.metrics_listen = absl::GetFlag(FLAGS_metrics_listen);
  options.port_file = absl::GetFlag(FLAGS_port_file);
  options.tls.cert_file = absl::GetFlag(FLAGS_tls_cert);
  options.tls.key_file = absl::GetFlag(FLAGS_tls_key);
  options.tls.client_ca_file = absl::GetFlag(FLAGS_tls_client_ca);
  options.max_connections = absl::GetFlag(FLAGS_max_connections);
  options.queue_capacity = absl::GetFlag(FLAGS_queue_capacity);
  options.max_queued_tokens = absl::GetFlag(FLAGS_max_queued_tokens);
  options.max_lanes = absl::GetFlag(FLAGS_max_lanes);
  options.staging_bytes = absl::GetFlag(FLAGS_staging_bytes);
  options.shared_memory_bytes = absl::GetFlag(FLAGS_shared_memory_bytes);
  options.shared_memory_dir = absl::GetFlag(FLAGS_shared_memory_dir);
  options.pack_threads = absl::GetFlag(FLAGS_pack_threads);
  options.frame_bytes = absl::GetFlag(FLAGS_frame_bytes);
  options.kv_bench_listen = absl::GetFlag(FLAGS_kv_bench_listen);
  options.deliver_to_allow = absl::GetFlag(FLAGS_deliver_to_allow);
  options.use_proxy = absl::GetFlag(FLAGS_use_proxy);
  options.stall_timeout = absl::Seconds(absl::GetFlag(FLAGS_stall_timeout_s));
  options.min_consumer_mb_per_s = absl::GetFlag(FLAGS_min_consumer_mb_per_s);
  options.resume_window = absl::Seconds(absl::GetFlag(FLAGS_resume_window_s));
  options.wedge_timeout = absl::Seconds(absl::GetFlag(FLAGS_wedge_timeout_s));
  options.drain_timeout = absl::Seconds(absl::GetFlag(FLAGS_drain_timeout_s));
  return options;
}

void ReadTenants(ServerOptions& options, std::vector<std::string>& problems) {
  options.tenant_evidence.metadata_key = absl::GetFlag(FLAGS_tenant_metadata_key);
  options.tenants_file = absl::GetFlag(FLAGS_tenants);
  if (options.tenants_file.empty()) return;
  if (auto table = Tenants::Read(options.tenants_file, StrangersOf(options.tenant_evidence.source));
      table.ok()) {
    options.tenants = *std::move(table);
  } else {
    problems.push_back(absl::StrCat("--tenants: ", table.status().message()));
  }
}

std::vector<const char*> AttentionFlags() {
  std::vector<const char*> names = {"policy", "allowed_policies"};
  for (const model::AttentionThreshold& threshold : model::kAttentionThresholds) {
    if ((threshold.setters & model::kOperator) != 0) names.push_back(threshold.name);
  }
  return names;
}

process::ProgramHelp Help() {
  return {
      .usage = "Disaggregated prefill server. prefilld --model=DIR [flags]",
      .groups = {
          {"Model",
           {"model", "ignore_config", "clusters", "device", "cpu_threads", "max_prompt_tokens",
            "max_batch_tokens", "max_resident_tokens", "max_graph_tokens"}},
          {"Addresses, TLS and log",
           {"listen", "metrics_listen", "port_file", "tls_cert", "tls_key", "tls_client_ca",
            "log_format"}},
          {"Attention", AttentionFlags()},
          {"Prefix cache",
           {"prefix_cache_bytes", "prefix_cache_reuse", "cache_watchers", "cache_watch_tokens"}},
          {"Recall audit", {"recall_audit_fraction", "recall_audit_rows"}},
          {"Connections and queue",
           {"max_connections", "queue_capacity", "max_queued_tokens", "scheduling"}},
          {"Tenants", {"tenant_from", "tenant_metadata_key", "tenants"}},
          {"KV delivery",
           {"max_lanes", "staging_bytes", "shared_memory_bytes", "shared_memory_dir", "frame_bytes",
            "pack_threads", "kv_bench_listen", "deliver_to_allow", "use_proxy"}},
          {"Time-outs",
           {"stall_timeout_s", "min_consumer_mb_per_s", "resume_window_s", "wedge_timeout_s",
            "drain_timeout_s"}}}};
}

}  // namespace

absl::StatusOr<ServerOptions> OptionsFromCommandLine(int argc, char** argv) {
  return OptionsFromFlags(process::ParseCommandLine(argc, argv, Help()));
}

absl::StatusOr<ServerOptions> OptionsFromFlags(const std::vector<char*>& positional) {
  process::Problems problems;
  for (size_t i = 1; i < positional.size(); ++i) {
    problems.push_back(absl::StrCat("argument '", positional[i], "' is not a flag"));
  }
  ServerOptions options = ReadPlainValues();
  ReadNamedValues(options, problems);
  ReadTenants(options, problems);
  if (const absl::Status status = Validate(options); !status.ok()) {
    problems.emplace_back(status.message());
  }
  PREFILLD_RETURN_IF_ERROR(process::ToStatus(problems));
  return options;
}

}  // namespace prefilld::server
