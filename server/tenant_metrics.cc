#include "server/tenant_metrics.h"

#include <string>

#include <prometheus/registry.h>

#include "server/prefill_job.h"

namespace prefilld::server {
namespace {

prometheus::Family<prometheus::Counter>& NewCounters(prometheus::Registry& registry,
                                                     const std::string& name,
                                                     const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}

}  // namespace

TenantMetrics::TenantMetrics(prometheus::Registry& registry, absl::Span<const Tenant> tenants)
    : families_{
          .requests = NewCounters(registry, "prefilld_tenant_requests_total",
                                  "Requests of the tenant that were taken in and are over."),
          .refused = NewCounters(registry, "prefilld_tenant_refused_total",
                                 "Requests of the tenant that found no room, a limit reached "
                                 "or the deadline out of reach, or that asked for what the "
                                 "tenant may not have."),
          .prompt_tokens = NewCounters(registry, "prefilld_tenant_prompt_tokens_total",
                                       "Tokens of the tenant's prompts whose requests are over."),
          .queue_time = NewCounters(registry, "prefilld_tenant_queue_seconds_total",
                                    "Time that those prompts waited in the queue."),
          .device_time =
              NewCounters(registry, "prefilld_tenant_device_seconds_total",
                          "Time that the device computed for the tenant; a batch counts to "
                          "its tenants by their tokens."),
          .queued = prometheus::BuildGauge()
                        .Name("prefilld_tenant_queued_requests")
                        .Help("Requests of the tenant that wait to compute.")
                        .Register(registry)} {
  SetTenants(tenants);
}

void TenantMetrics::SetTenants(absl::Span<const Tenant> tenants) {
  absl::MutexLock lock(&mu_);
  while (series_.size() < tenants.size()) {
    const prometheus::Labels labels = {{"tenant", tenants[series_.size()].name}};
    series_.push_back({.requests = families_.requests.Add(labels),
                       .refused = families_.refused.Add(labels),
                       .prompt_tokens = families_.prompt_tokens.Add(labels),
                       .queue_time = families_.queue_time.Add(labels),
                       .device_time = families_.device_time.Add(labels),
                       .queued = families_.queued.Add(labels)});
  }
}

void TenantMetrics::CountRefused(size_t tenant) { Of(tenant).refused.Increment(); }

void TenantMetrics::CountRequest(const PrefillJob& job) {
  Series& series = Of(static_cast<size_t>(job.work().tenant));
  const RequestStats stats = job.record().stats();
  series.requests.Increment();
  series.prompt_tokens.Increment(static_cast<double>(job.work().tokens.size()));
  if (!stats.started_at.has_value()) return;
  series.queue_time.Increment(absl::ToDoubleSeconds(*stats.started_at - stats.accepted_at));
}

void TenantMetrics::CountDeviceTime(size_t tenant, absl::Duration time) {
  Of(tenant).device_time.Increment(absl::ToDoubleSeconds(time));
}

void TenantMetrics::SetQueued(absl::Span<const int64_t> requests) {
  for (size_t t = 0; t < requests.size(); ++t) {
    Of(t).queued.Set(static_cast<double>(requests[t]));
  }
}

}  // namespace prefilld::server
