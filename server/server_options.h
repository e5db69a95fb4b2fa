// The settings of an operator. The flags that set them are read in options.cc.
#ifndef PREFILLD_SERVER_SERVER_OPTIONS_H_
#define PREFILLD_SERVER_SERVER_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/attention_options.h"
#include "proto/process/log.h"
#include "proto/wire/tls.h"
#include "server/tenant_identity.h"
#include "server/turns.h"

namespace prefilld::server {

// Limits for requests whose recall is measured (model/sparse/recall_audit.h).
struct RecallAuditLimits {
  double fraction = 0.0;  // share of the requests that do not ask, drawn at random
  // Query blocks per layer: those of a drawn request, and the most that a request may ask for.
  int64_t rows = 8;
};

// Who may follow the prefix cache (cache_watch.h), and what they are told.
struct CacheWatchRules {
  std::vector<std::string> watchers;  // names of tenants, or kAllWatchers; empty: nobody
  bool tokens = false;                // of blocks, too, if their prompts had no salt
};
inline constexpr char kAllWatchers[] = "all";

struct ServerOptions {
  model::EngineOptions engine;
  // Unset fields take the engine's defaults, which may come from the checkpoint's head clusters.
  model::AttentionOverrides attention;
  // Baselines serve evaluations, so an operator has to name them.
  std::vector<model::AttentionPolicy> allowed_policies = model::PoliciesForServing();
  RecallAuditLimits recall_audit;

  // host:port (port 0: any free one) and unix:/path, several of them separated by commas.
  std::string listen = "0.0.0.0:50051";
  std::string metrics_listen = "0.0.0.0:9464";  // empty: no metrics endpoint
  std::string port_file;   // when set, the chosen ports are written here once all is ready
  wire::ServerTls tls;     // for the calls that come in, and for pushes, which go out
  bool use_proxy = false;  // for pushes, as in wire::ChannelOptions
  process::LogFormat log_format = process::LogFormat::kText;

  int64_t max_connections = 1024;  // open at once; more are refused
  int64_t queue_capacity = 64;     // requests waiting behind those that run
  int64_t max_queued_tokens = 0;   // tokens waiting; 0: 8 prompts of the greatest length
  Scheduling scheduling = Scheduling::kTurns;
  int max_lanes = 16;
  int64_t staging_bytes = int64_t{256} << 20;
  int64_t frame_bytes = int64_t{2} << 20;
  // Memory of consumers of this host that is mapped in all; 0: KV goes over gRPC alone.
  int64_t shared_memory_bytes = int64_t{4} << 30;
  int64_t max_shared_memories = 256;  // memories, each of which has a thread; no flag sets it
  std::string shared_memory_dir;      // has a socket for those of other pods; empty: none
  int pack_threads = 0;               // that pack and send KV; 0: as PackThreads says
  std::string kv_bench_listen;        // host:port; set: made-up KV is served, without a model
  CacheWatchRules cache_watch;
  TenantEvidence tenant_evidence;             // how those who share the server are told apart
  Tenants tenants;                            // those of the start
  std::string tenants_file;                   // that they were read from; empty: none
  std::vector<std::string> deliver_to_allow;  // patterns (address_pattern.h); empty: no push

  absl::Duration stall_timeout = absl::Seconds(30);
  double min_consumer_mb_per_s = 50;                 // of one that others wait for; 0: any
  absl::Duration resume_window = absl::Seconds(10);  // 0: no request is resumable
  absl::Duration wedge_timeout = absl::Seconds(300);
  absl::Duration drain_timeout = absl::Seconds(25);
};

// Returns all problems of `options` in one INVALID_ARGUMENT, separated by "; ".
absl::Status Validate(const ServerOptions& options);
// Does the same with a table of tenants that may take the place of options.tenants. Those who
// followed the prefix cache may be gone from it.
absl::Status CheckTenants(const ServerOptions& options, const Tenants& table);

// Returns the number of threads that pack and send KV on a machine with so many cores: half of
// them, at most 8. They serve the lanes of all requests. With fewer than lanes ask for, packing
// holds a transfer up; with more, they take cores from gRPC's threads, which send.
int PackThreads(const ServerOptions& options, int num_cores);

// Lists the effective configuration as (flag, value) pairs, for the log.
std::vector<std::pair<std::string, std::string>> Describe(const ServerOptions& options);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SERVER_OPTIONS_H_
