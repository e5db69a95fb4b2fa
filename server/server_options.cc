#include "server/server_options.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/process/problems.h"
#include "proto/wire/address_pattern.h"
#include "proto/wire/host_port.h"

namespace prefilld::server {
namespace {

using process::AddIfAny;
using process::CheckRange;
using process::CheckSeconds;

constexpr int64_t kMiB = int64_t{1} << 20;

const char* DeviceName(model::DeviceChoice choice) {
  switch (choice) {
    case model::DeviceChoice::kAuto:
      return "auto";
    case model::DeviceChoice::kCpu:
      return "cpu";
    case model::DeviceChoice::kCuda:
      return "cuda";
  }
  return "?";
}

void CheckAddresses(const ServerOptions& o, process::Problems& problems) {
  for (const std::string& address : wire::SplitAddresses(o.listen)) {
    AddIfAny(wire::ListenOrUnixProblem("--listen", address), problems);
  }
  if (!o.metrics_listen.empty()) {
    AddIfAny(wire::ListenAddressProblem("--metrics_listen", o.metrics_listen), problems);
  }
  if (!o.kv_bench_listen.empty()) {
    AddIfAny(wire::ListenAddressProblem("--kv_bench_listen", o.kv_bench_listen), problems);
  }
  for (const std::string& pattern : o.deliver_to_allow) {
    if (const auto problem = wire::AddressPatternProblem(pattern)) {
      problems.push_back(absl::StrCat("--deliver_to_allow: ", *problem));
    }
  }
}

void CheckAttention(const ServerOptions& o, process::Problems& problems) {
  const absl::Status status = model::Validate(Apply(o.attention, model::AttentionOptions()));
  if (!status.ok()) problems.push_back(absl::StrCat("attention flags: ", status.message()));
  const auto& allowed = o.allowed_policies;
  if (o.attention.policy.has_value() &&
      std::find(allowed.begin(), allowed.end(), *o.attention.policy) == allowed.end()) {
    problems.push_back(absl::StrCat("--policy=", model::Name(*o.attention.policy),
                                    " is not among --allowed_policies"));
  }
}

void CheckCacheWatch(const ServerOptions& o, process::Problems& problems) {
  if (!o.cache_watch.watchers.empty() && o.engine.prefix_cache_bytes == 0) {
    problems.push_back("--cache_watchers needs --prefix_cache_bytes");
  }
  if (o.cache_watch.tokens && o.cache_watch.watchers.empty()) {
    problems.push_back("--cache_watch_tokens needs --cache_watchers");
  }
}

void CheckWatchersAreTenants(const ServerOptions& o, const Tenants& table,
                             process::Problems& problems) {
  for (const std::string& name : o.cache_watch.watchers) {
    const auto is_named = [&name](const Tenant& tenant) { return tenant.name == name; };
    const bool is_tenant = o.tenant_evidence.source != TenantSource::kNone &&
                           std::any_of(table.all().begin(), table.all().end(), is_named);
    if (name == kAllWatchers || is_tenant) continue;
    problems.push_back(
        absl::StrCat("--cache_watchers: '", name, "' is neither all nor a tenant of --tenants"));
  }
}

// A limit that can never be met, or never matters, is a mistake in the file.
void CheckLimitsOfTenant(const ServerOptions& o, const Tenant& tenant,
                         process::Problems& problems) {
  for (const model::AttentionPolicy policy : tenant.policies) {
    const auto& allowed = o.allowed_policies;
    if (std::find(allowed.begin(), allowed.end(), policy) != allowed.end()) continue;
    problems.push_back(absl::StrCat("tenant ", tenant.name, ": policies has ", model::Name(policy),
                                    ", which is not among --allowed_policies"));
  }
  if (!tenant.certificates.empty() &&
      (o.tenant_evidence.source != TenantSource::kToken || o.tls.client_ca_file.empty())) {
    problems.push_back(absl::StrCat("tenant ", tenant.name,
                                    ": certificates needs --tenant_from=token and "
                                    "--tls_client_ca"));
  }
}

void CheckTable(const ServerOptions& o, const Tenants& table, process::Problems& problems) {
  if (o.tenant_evidence.source == TenantSource::kNone && table.all().size() > 1) {
    problems.push_back("--tenants names more than the default tenant; --tenant_from is needed");
  }
  for (const Tenant& tenant : table.all()) CheckLimitsOfTenant(o, tenant, problems);
}

void CheckEvidence(const ServerOptions& o, process::Problems& problems) {
  const TenantSource source = o.tenant_evidence.source;
  if (source != TenantSource::kNone && o.tenants_file.empty()) {
    problems.push_back(absl::StrCat("--tenant_from=", Name(source), " needs --tenants"));
  }
  // This holds at the start alone: the last token may be revoked while the server runs.
  if (source == TenantSource::kToken && !o.tenants.has_tokens()) {
    problems.push_back("--tenant_from=token needs a token_sha256 in --tenants");
  }
  if (source == TenantSource::kCertificate && o.tls.client_ca_file.empty()) {
    problems.push_back("--tenant_from=certificate needs --tls_client_ca");
  }
  AddIfAny(MetadataKeyProblem("--tenant_metadata_key", o.tenant_evidence.metadata_key), problems);
}

}  // namespace

absl::Status CheckTenants(const ServerOptions& o, const Tenants& table) {
  process::Problems problems;
  CheckTable(o, table, problems);
  return process::ToStatus(problems);
}

absl::Status Validate(const ServerOptions& o) {
  process::Problems problems;
  if (o.engine.checkpoint_dir.empty() == o.kv_bench_listen.empty()) {
    problems.push_back(o.kv_bench_listen.empty()
                           ? "--model is required"
                           : "--model and --kv_bench_listen exclude each other");
  }
  CheckRange("--cpu_threads", o.engine.cpu_threads, 0, 4096, problems);
  CheckRange("--max_prompt_tokens", o.engine.max_tokens, 0, int64_t{1} << 24, problems);
  CheckRange("--max_batch_tokens", o.engine.max_batch_tokens.value_or(0), 0, model::kMaxBatchTokens,
             problems);
  CheckRange("--max_graph_tokens", o.engine.max_graph_tokens.value_or(0), 0, model::kMaxGraphTokens,
             problems);
  CheckRange("--max_resident_tokens", o.engine.max_resident_tokens, 0, int64_t{1} << 28, problems);
  CheckRange("--prefix_cache_bytes", o.engine.prefix_cache_bytes, 0, model::kMaxPrefixCacheBytes,
             problems);
  CheckAddresses(o, problems);
  wire::CheckServerTls(o.tls, problems);
  CheckAttention(o, problems);
  if (!(o.recall_audit.fraction >= 0 && o.recall_audit.fraction <= 1)) {
    problems.push_back(
        absl::StrCat("--recall_audit_fraction=", o.recall_audit.fraction, " is outside [0, 1]"));
  }
  CheckRange("--recall_audit_rows", o.recall_audit.rows, 0, 1024, problems);
  CheckEvidence(o, problems);
  CheckTable(o, o.tenants, problems);
  CheckWatchersAreTenants(o, o.tenants, problems);
  CheckCacheWatch(o, problems);
  CheckRange("--max_connections", o.max_connections, 1, 1 << 20, problems);
  CheckRange("--queue_capacity", o.queue_capacity, 0, 1 << 20, problems);
  CheckRange("--max_queued_tokens", o.max_queued_tokens, 0, int64_t{1} << 36, problems);
  CheckRange("--max_lanes", o.max_lanes, 1, 16, problems);
  CheckRange("--frame_bytes", o.frame_bytes, kMiB, 4 * kMiB, problems);
  CheckRange("--pack_threads", o.pack_threads, 0, 64, problems);
  CheckRange("--staging_bytes", o.staging_bytes, 4 * o.frame_bytes, int64_t{1} << 40, problems);
  CheckRange("--shared_memory_bytes", o.shared_memory_bytes, 0, int64_t{1} << 40, problems);
  if (!o.shared_memory_dir.empty() && o.shared_memory_bytes == 0) {
    problems.push_back("--shared_memory_dir needs --shared_memory_bytes");
  }
  CheckSeconds("--stall_timeout_s", o.stall_timeout, 3600, problems);
  if (o.resume_window != absl::ZeroDuration()) {
    CheckSeconds("--resume_window_s", o.resume_window, 600, problems);
  }
  CheckSeconds("--wedge_timeout_s", o.wedge_timeout, 86400, problems);
  CheckSeconds("--drain_timeout_s", o.drain_timeout, 86400, problems);
  if (!(o.min_consumer_mb_per_s >= 0 && o.min_consumer_mb_per_s <= 1e6)) {
    problems.push_back(absl::StrCat("--min_consumer_mb_per_s=", o.min_consumer_mb_per_s,
                                    " is outside 0 to 1000000"));
  }
  if (o.wedge_timeout <= o.stall_timeout) {
    problems.push_back("--wedge_timeout_s must be more than --stall_timeout_s");
  }
  if (o.wedge_timeout <= o.resume_window) {
    problems.push_back("--wedge_timeout_s must be more than --resume_window_s");
  }
  return process::ToStatus(problems);
}

int PackThreads(const ServerOptions& options, int num_cores) {
  constexpr int kMost = 8;
  if (options.pack_threads > 0) return options.pack_threads;
  return std::clamp(num_cores / 2, 1, kMost);
}

std::vector<std::pair<std::string, std::string>> Describe(const ServerOptions& o) {
  const std::string allowed =
      absl::StrJoin(o.allowed_policies, ",", [](std::string* out, model::AttentionPolicy policy) {
        absl::StrAppend(out, model::Name(policy));
      });
  return {{"model", o.engine.checkpoint_dir},
          {"ignore_config", absl::StrJoin(o.engine.overruled_config_keys, ",")},
          {"device", DeviceName(o.engine.device)},
          {"cpu_threads", absl::StrCat(o.engine.cpu_threads)},
          {"max_prompt_tokens", absl::StrCat(o.engine.max_tokens)},
          {"max_batch_tokens",
           o.engine.max_batch_tokens ? absl::StrCat(*o.engine.max_batch_tokens) : "by device"},
          {"max_graph_tokens",
           o.engine.max_graph_tokens ? absl::StrCat(*o.engine.max_graph_tokens) : "by device"},
          {"max_resident_tokens", absl::StrCat(o.engine.max_resident_tokens)},
          {"prefix_cache_bytes", absl::StrCat(o.engine.prefix_cache_bytes)},
          {"prefix_cache_reuse", model::Name(o.engine.prefix_reuse)},
          {"cache_watchers", absl::StrJoin(o.cache_watch.watchers, ",")},
          {"cache_watch_tokens", o.cache_watch.tokens ? "yes" : "no"},
          {"listen", o.listen},
          {"metrics_listen", o.metrics_listen},
          {"tls", o.tls.mode()},
          {"use_proxy", o.use_proxy ? "yes" : "no"},
          {"allowed_policies", allowed},
          {"recall_audit_fraction", absl::StrCat(o.recall_audit.fraction)},
          {"recall_audit_rows", absl::StrCat(o.recall_audit.rows)},
          {"max_connections", absl::StrCat(o.max_connections)},
          {"queue_capacity", absl::StrCat(o.queue_capacity)},
          {"max_queued_tokens", absl::StrCat(o.max_queued_tokens)},
          {"scheduling", Name(o.scheduling)},
          {"tenant_from", Name(o.tenant_evidence.source)},
          {"tenant_metadata_key", o.tenant_evidence.metadata_key},
          {"tenants", absl::StrCat(o.tenants.all().size())},
          {"max_lanes", absl::StrCat(o.max_lanes)},
          {"staging_bytes", absl::StrCat(o.staging_bytes)},
          {"shared_memory_bytes", absl::StrCat(o.shared_memory_bytes)},
          {"shared_memory_dir", o.shared_memory_dir},
          {"pack_threads", absl::StrCat(o.pack_threads)},
          {"frame_bytes", absl::StrCat(o.frame_bytes)},
          {"kv_bench_listen", o.kv_bench_listen},
          {"deliver_to_allow", absl::StrJoin(o.deliver_to_allow, ",")},
          {"stall_timeout", absl::FormatDuration(o.stall_timeout)},
          {"min_consumer_mb_per_s", absl::StrCat(o.min_consumer_mb_per_s)},
          {"resume_window", absl::FormatDuration(o.resume_window)},
          {"wedge_timeout", absl::FormatDuration(o.wedge_timeout)},
          {"drain_timeout", absl::FormatDuration(o.drain_timeout)}};
}

}  // namespace prefilld::server
