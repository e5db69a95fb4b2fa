// The metrics that carry the name of a tenant. Their number is bounded by the operator's table.
#ifndef PREFILLD_SERVER_TENANT_METRICS_H_
#define PREFILLD_SERVER_TENANT_METRICS_H_

#include <cstddef>
#include <cstdint>
#include <deque>

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/tenants.h"

namespace prometheus {
class Registry;
}  // namespace prometheus

namespace prefilld::server {

class PrefillJob;

// Thread-safe.
class TenantMetrics {
 public:
  TenantMetrics(prometheus::Registry& registry, absl::Span<const Tenant> tenants);

  // Adds series for the tenants behind those that there are.
  void SetTenants(absl::Span<const Tenant> tenants);

  // Counts a request that was not taken in, for want of room or because of a limit or deadline.
  void CountRefused(size_t tenant);
  void CountRequest(const PrefillJob& job);  // once, when its Prefill call is over
  void CountDeviceTime(size_t tenant, absl::Duration time);
  void SetQueued(absl::Span<const int64_t> requests);  // [tenants]

 private:
  struct Series {
    prometheus::Counter& requests;
    prometheus::Counter& refused;
    prometheus::Counter& prompt_tokens;
    prometheus::Counter& queue_time;
    prometheus::Counter& device_time;
    prometheus::Gauge& queued;
  };

  struct Families {
    prometheus::Family<prometheus::Counter>& requests;
    prometheus::Family<prometheus::Counter>& refused;
    prometheus::Family<prometheus::Counter>& prompt_tokens;
    prometheus::Family<prometheus::Counter>& queue_time;
    prometheus::Family<prometheus::Counter>& device_time;
    prometheus::Family<prometheus::Gauge>& queued;
  };

  Series& Of(size_t tenant) {
    absl::MutexLock lock(&mu_);
    return series_[tenant];
  }

  const Families families_;
  absl::Mutex mu_;
  std::deque<Series> series_ ABSL_GUARDED_BY(mu_);  // [tenants]; each stays where it is
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TENANT_METRICS_H_
