#include "server/tenant_metrics.h"

#include <string>

#include <prometheus/registry.h>

#include "server/prefill_job.h"

namespace prefilld::server {

TenantMetrics::TenantMetrics(prometheus::Registry& registry, absl::Span<const Tenant> tenants) {
  const auto counters = [&registry](
                            const std::string& name,
                            const std::string& help) -> prometheus::Family<prometheus::Counter>& {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
  };
  auto& requests = counters("prefilld_tenant_requests_total",
                            "Requests of the tenant that were taken in and are over.");
  auto& refused = counters("prefilld_tenant_refused_total",
                           "Requests of the tenant that found no room, a limit reached or the "
                           "deadline out of reach.");
  auto& prompt_tokens = counters("prefilld_tenant_prompt_tokens_total",
                                 "Tokens of the tenant's prompts whose requests are over.");
  auto& queue_time = counters("prefilld_tenant_queue_seconds_total",
                              "Time that those prompts waited in the queue.");
  auto& device_time =
      counters("prefilld_tenant_device_seconds_total",
               "Time that the device computed for the tenant; a batch counts to its "
               "tenants by their tokens.");
  auto& queued = prometheus::BuildGauge()
                     .Name("prefilld_tenant_queued_requests")
                     .Help("Requests of the tenant that wait to compute.")
                     .Register(registry);
  for (const Tenant& tenant : tenants) {
    const prometheus::Labels labels = {{"tenant", tenant.name}};
    series_.push_back({.requests = requests.Add(labels),
                       .refused = refused.Add(labels),
                       .prompt_tokens = prompt_tokens.Add(labels),
                       .queue_time = queue_time.Add(labels),
                       .device_time = device_time.Add(labels),
                       .queued = queued.Add(labels)});
  }
}

void TenantMetrics::CountRefused(size_t tenant) { series_[tenant].refused.Increment(); }

void TenantMetrics::CountRequest(const PrefillJob& job) {
  Series& series = series_[static_cast<size_t>(job.work().tenant)];
  const RequestStats stats = job.record().stats();
  series.requests.Increment();
  series.prompt_tokens.Increment(static_cast<double>(job.work().tokens.size()));
  if (!stats.started_at.has_value()) return;
  series.queue_time.Increment(absl::ToDoubleSeconds(*stats.started_at - stats.accepted_at));
}

void TenantMetrics::CountDeviceTime(size_t tenant, absl::Duration time) {
  series_[tenant].device_time.Increment(absl::ToDoubleSeconds(time));
}

void TenantMetrics::SetQueued(absl::Span<const int64_t> requests) {
  for (size_t t = 0; t < requests.size(); ++t) {
    series_[t].queued.Set(static_cast<double>(requests[t]));
  }
}

}  // namespace prefilld::server
