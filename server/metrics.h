// The metrics that Prometheus scrapes. Names follow its conventions: base units, `_total` for
// counters.
#ifndef PREFILLD_SERVER_METRICS_H_
#define PREFILLD_SERVER_METRICS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/prefill/prefill_engine.h"
#include "server/first_token_metrics.h"
#include "server/outcome.h"
#include "server/prefill_job.h"
#include "server/prefix_cache_metrics.h"
#include "server/refusal_cause.h"
#include "server/resumption_metrics.h"
#include "server/shared_memory_metrics.h"
#include "server/tenant_metrics.h"
#include "server/tenants.h"

namespace prometheus {
class Registry;
}  // namespace prometheus

namespace prefilld::server {

// The use of queue and memory at one moment.
struct ResourceUse {
  int64_t queued_requests = 0;
  int64_t queued_tokens = 0;
  int64_t running_requests = 0;
  int64_t ended_in_passes = 0;
  bool computing = false;
  int64_t live_requests = 0;  // queued, running, or still being sent
  int64_t staged_bytes = 0;
  int64_t staging_capacity_bytes = 0;
  int64_t device_bytes = 0;
  model::ResidentTokens resident_tokens;
  int64_t recorded_layers = 0;
  model::PrefixCacheUse prefix_cache;
  bool ready = false;
  bool live = false;
  bool progressing = false;                // work does not wait in vain
  absl::Duration draining;                 // since when the server drains; zero: it does not
  std::vector<int64_t> queued_of_tenants;  // requests; [tenants]
};

// Thread-safe.
class Metrics {
 public:
  explicit Metrics(const model::EngineInfo& engine,
                   absl::Span<const Tenant> tenants = Tenants().all());
  ~Metrics();

  // Counts a request that was refused, by its outcome and by the status's cause.
  void CountRefused(Outcome outcome, const absl::Status& status);
  // Counts the refusal of any call, by its cause.
  void CountRefusal(const absl::Status& status);
  void CountIgnoredTrace();
  void CountRequest(const PrefillJob& job, absl::Time now);  // once, when its Prefill call is over
  // Counts a further receiver of a request, however it ended.
  void CountReceiver(Outcome outcome);
  void CountPass(int num_prompts);
  // `num_tokens` counts the tokens that are computed, of all prompts of the pass.
  void CountLayer(const model::LayerReport& report, int num_prompts, int64_t num_tokens);
  void CountFrame(int lane, int64_t payload_bytes, bool is_shared);
  void CountStall(absl::Duration stalled);
  void CountDeviceError();
  void Set(const ResourceUse& use);
  // Shows what the operator allows.
  void SetLimits(int64_t queued_tokens, absl::Duration drain);

  TenantMetrics& tenants() { return tenants_; }
  ResumptionMetrics& resumption() { return resumption_; }
  SharedMemoryMetrics& shared_memory() { return shared_memory_; }

  const std::shared_ptr<prometheus::Registry>& registry() const { return registry_; }

 private:
  void ShowCalibratedLoss(const model::CalibratedLoss& loss);
  prometheus::Counter& NewCounter(const std::string& name, const std::string& help);
  prometheus::Gauge& NewGauge(const std::string& name, const std::string& help);
  prometheus::Histogram& NewHistogram(const std::string& name, const std::string& help,
                                      const std::vector<double>& buckets);

  const std::shared_ptr<prometheus::Registry> registry_;

  absl::flat_hash_map<Outcome, prometheus::Counter*> requests_;
  absl::flat_hash_map<Outcome, prometheus::Counter*> receivers_;
  absl::flat_hash_map<RefusalCause, prometheus::Counter*> refusals_;
  prometheus::Counter& ignored_traces_;
  absl::flat_hash_map<model::AttentionPolicy, prometheus::Counter*> policies_;  // without kAuto
  prometheus::Counter& fallbacks_;
  prometheus::Counter& beyond_calibration_;
  FirstTokenMetrics time_to_first_token_;
  prometheus::Histogram& queue_time_;
  prometheus::Histogram& compute_time_;
  prometheus::Histogram& request_time_;
  prometheus::Histogram& prompt_tokens_;
  prometheus::Histogram& density_;
  prometheus::Histogram& pattern_time_;
  prometheus::Gauge& tokens_per_second_;

  prometheus::Histogram& batch_prompts_;
  prometheus::Histogram& step_time_;
  prometheus::Counter& computed_layers_;
  prometheus::Counter& computed_token_layers_;
  // One counter for each count of heads in a layer's report.
  std::vector<std::pair<int model::LayerReport::*, prometheus::Counter*>> heads_;
  prometheus::Counter& recall_audits_;
  prometheus::Counter& recall_audit_time_;
  absl::flat_hash_map<model::PatternSource, prometheus::Histogram*> recall_;
  absl::flat_hash_map<model::PatternSource, prometheus::Gauge*> lowest_recall_;

  std::vector<prometheus::Counter*> lane_bytes_;
  std::vector<prometheus::Counter*> lane_frames_;
  prometheus::Counter& stall_time_;
  prometheus::Counter& device_errors_;

  prometheus::Gauge& queued_requests_;
  prometheus::Gauge& queued_tokens_;
  prometheus::Gauge& queued_tokens_limit_;
  prometheus::Gauge& running_requests_;
  prometheus::Gauge& ended_in_passes_;
  prometheus::Gauge& computing_;
  prometheus::Gauge& live_requests_;
  prometheus::Gauge& staged_bytes_;
  prometheus::Gauge& staging_capacity_;
  prometheus::Gauge& kv_utilization_;
  prometheus::Gauge& device_bytes_;
  prometheus::Gauge& resident_tokens_;
  prometheus::Gauge& resident_tokens_limit_;
  prometheus::Gauge& recorded_layers_;
  PrefixCacheMetrics prefix_cache_;
  prometheus::Gauge& ready_;
  prometheus::Gauge& live_;
  prometheus::Gauge& progressing_;
  prometheus::Gauge& drain_time_;
  prometheus::Gauge& drain_timeout_;

  TenantMetrics tenants_;
  ResumptionMetrics resumption_;
  SharedMemoryMetrics shared_memory_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_METRICS_H_
