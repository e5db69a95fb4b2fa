#include "server/resumption_metrics.h"

#include <string>

#include <prometheus/registry.h>

namespace prefilld::server {
namespace {

prometheus::Counter& NewCounter(prometheus::Registry& registry, const std::string& name,
                                const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
}

prometheus::Gauge& NewGauge(prometheus::Registry& registry, const std::string& name,
                            const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

// The family is registered by the first of these and found by the second.
prometheus::Counter& NewResent(prometheus::Registry& registry, const std::string& cause) {
  return prometheus::BuildCounter()
      .Name("prefilld_kv_frames_resent_total")
      .Help("KV frames sent once more, because a stream was resumed or they arrived damaged.")
      .Register(registry)
      .Add({{"cause", cause}});
}

}  // namespace

ResumptionMetrics::ResumptionMetrics(prometheus::Registry& registry)
    : streams_(NewCounter(registry, "prefilld_resumed_streams_total",
                          "Streams attached in place of others that had broken.")),
      frames_of_streams_(NewResent(registry, "resumed")),
      frames_damaged_(NewResent(registry, "damaged")),
      refused_(NewCounter(registry, "prefilld_resume_refused_total",
                          "Requests that ended when their connection broke, because too many "
                          "others waited for their consumers, or held too much memory.")),
      plain_pushes_(NewCounter(registry, "prefilld_plain_pushes_total",
                               "Pushes to receivers without ReceiveLane: one lane, which ends with "
                               "its connection.")),
      waiting_(NewGauge(registry, "prefilld_waiting_for_consumer",
                        "Requests whose consumer is away and may come back.")),
      waiting_bytes_(NewGauge(registry, "prefilld_waiting_for_consumer_bytes",
                              "Staging memory that these hold.")),
      retained_frames_(NewGauge(registry, "prefilld_kv_frames_retained",
                                "KV frames of requests that may be resumed, which wait to be sent "
                                "or are not acknowledged.")) {}

void ResumptionMetrics::CountResumed(int64_t frames_again) {
  streams_.Increment();
  frames_of_streams_.Increment(static_cast<double>(frames_again));
}

void ResumptionMetrics::CountDamaged(int64_t frames) {
  frames_damaged_.Increment(static_cast<double>(frames));
}

void ResumptionMetrics::CountRefused() { refused_.Increment(); }

void ResumptionMetrics::CountPlainPush() { plain_pushes_.Increment(); }

void ResumptionMetrics::SetWaiting(int64_t requests, int64_t held_bytes, int64_t retained_frames) {
  waiting_.Set(static_cast<double>(requests));
  waiting_bytes_.Set(static_cast<double>(held_bytes));
  retained_frames_.Set(static_cast<double>(retained_frames));
}

}  // namespace prefilld::server
