#include "client/decode_worker/metrics.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "proto/process/log.h"
#include "proto/process/metrics_endpoint.h"
#include "proto/process/process_metrics.h"
#include "proto/status_macros.h"

namespace prefilld::client {
namespace {

prometheus::Histogram::BucketBoundaries TtftBuckets() {
  return {0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000};
}

// A gauge that asks for the number of free blocks when it is scraped.
class PoolGauge : public prometheus::Collectable {
 public:
  PoolGauge(int64_t num_blocks, std::function<int64_t()> free_blocks)
      : num_blocks_(num_blocks), free_blocks_(std::move(free_blocks)) {}

  std::vector<prometheus::MetricFamily> Collect() const override {
    return {Gauge("prefilld_decode_kv_blocks", "KV blocks of the pool.", num_blocks_),
            Gauge("prefilld_decode_kv_free_blocks", "KV blocks that no request holds.",
                  free_blocks_())};
  }

 private:
  static prometheus::MetricFamily Gauge(const char* name, const char* help, int64_t value) {
    prometheus::MetricFamily family;
    family.name = name;
    family.help = help;
    family.type = prometheus::MetricType::Gauge;
    family.metric.emplace_back();
    family.metric.back().gauge.value = static_cast<double>(value);
    return family;
  }

  const int64_t num_blocks_;
  const std::function<int64_t()> free_blocks_;
};

}  // namespace

struct WorkerMetrics::Families {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  std::shared_ptr<PoolGauge> pool;
  std::unique_ptr<process::MetricsEndpoint> endpoint;

  prometheus::Gauge& running = prometheus::BuildGauge()
                                   .Name("prefilld_decode_running_requests")
                                   .Help("Generate requests being served.")
                                   .Register(*registry)
                                   .Add({});
  prometheus::Family<prometheus::Counter>& requests =
      prometheus::BuildCounter()
          .Name("prefilld_decode_requests_total")
          .Help("Generate requests that ended, by gRPC status.")
          .Register(*registry);
  prometheus::Family<prometheus::Counter>& transfers =
      prometheus::BuildCounter()
          .Name("prefilld_decode_kv_transfers_total")
          .Help("KV transfers that ended, by gRPC status.")
          .Register(*registry);
  prometheus::Family<prometheus::Counter>& pulls =
      prometheus::BuildCounter()
          .Name("prefilld_decode_kv_pulls_total")
          .Help("KV transfers that prefilld accepted, by the transport of their payloads.")
          .Register(*registry);
  prometheus::Counter& shared_pulls = pulls.Add({{"transport", "shared_memory"}});
  prometheus::Counter& grpc_pulls = pulls.Add({{"transport", "grpc"}});
  absl::Mutex mu;
  std::set<std::string> known_reasons ABSL_GUARDED_BY(mu);  // why pulls went over gRPC
  prometheus::Counter& kv_bytes = prometheus::BuildCounter()
                                      .Name("prefilld_decode_kv_received_bytes_total")
                                      .Help("KV bytes verified and stored.")
                                      .Register(*registry)
                                      .Add({});
  prometheus::Counter& tokens = prometheus::BuildCounter()
                                    .Name("prefilld_decode_tokens_total")
                                    .Help("Tokens generated, first tokens included.")
                                    .Register(*registry)
                                    .Add({});
  prometheus::Counter& ignored_traces =
      prometheus::BuildCounter()
          .Name("prefilld_decode_trace_contexts_ignored_total")
          .Help("Calls whose traceparent or tracestate was not valid and was not used.")
          .Register(*registry)
          .Add({});
  prometheus::Histogram& ttft = prometheus::BuildHistogram()
                                    .Name("prefilld_decode_time_to_first_token_seconds")
                                    .Help("From the arrival of a request to its first token.")
                                    .Register(*registry)
                                    .Add({}, TtftBuckets());
};

// All of gRPC's statuses are there from the start: a series that came with the first failure would
// hide that from a rate.
WorkerMetrics::WorkerMetrics() : families_(std::make_unique<Families>()) {
  for (int code = 0; code <= static_cast<int>(absl::StatusCode::kUnauthenticated); ++code) {
    const std::string name = absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
    families_->requests.Add({{"status", name}});
    families_->transfers.Add({{"status", name}});
  }
}
WorkerMetrics::~WorkerMetrics() = default;

void WorkerMetrics::RequestStarted() { families_->running.Increment(); }

void WorkerMetrics::RequestEnded(const absl::Status& status) {
  families_->running.Decrement();
  families_->requests.Add({{"status", absl::StatusCodeToString(status.code())}}).Increment();
}

void WorkerMetrics::CountTransfer(uint64_t kv_bytes, const absl::Status& status) {
  families_->kv_bytes.Increment(static_cast<double>(kv_bytes));
  families_->transfers.Add({{"status", absl::StatusCodeToString(status.code())}}).Increment();
}

void WorkerMetrics::CountPull(const absl::Status& shared_memory) {
  if (shared_memory.ok()) return families_->shared_pulls.Increment();
  families_->grpc_pulls.Increment();
  constexpr size_t kMaxReasons = 64;
  const std::string reason(shared_memory.message());
  absl::MutexLock lock(&families_->mu);
  if (families_->known_reasons.size() >= kMaxReasons) return;
  if (!families_->known_reasons.insert(reason).second) return;
  process::LogEvent(process::LogLevel::kInfo, "kv_over_grpc", {{"reason", reason}});
}

void WorkerMetrics::CountIgnoredTrace() { families_->ignored_traces.Increment(); }

void WorkerMetrics::CountToken() { families_->tokens.Increment(); }

void WorkerMetrics::ObserveTimeToFirstToken(absl::Duration ttft) {
  families_->ttft.Observe(absl::ToDoubleSeconds(ttft));
}

void WorkerMetrics::WatchPool(int64_t num_blocks, std::function<int64_t()> free_blocks) {
  families_->pool = std::make_shared<PoolGauge>(num_blocks, std::move(free_blocks));
}

const std::shared_ptr<prometheus::Registry>& WorkerMetrics::registry() const {
  return families_->registry;
}

absl::StatusOr<int> WorkerMetrics::Serve(const std::string& address,
                                         std::shared_ptr<prometheus::Collectable> more,
                                         std::shared_ptr<const std::atomic<bool>> live) {
  if (address.empty()) return 0;
  std::vector<std::shared_ptr<prometheus::Collectable>> collectables = {
      families_->registry, process::LogMetrics(), process::ProcessMetrics(), std::move(more)};
  if (families_->pool != nullptr) collectables.push_back(families_->pool);
  PREFILLD_ASSIGN_OR_RETURN(
      families_->endpoint,
      process::MetricsEndpoint::Create(address, std::move(collectables), std::move(live)));
  return families_->endpoint->port();
}

}  // namespace prefilld::client
