// The metrics of the prefix cache.
#ifndef PREFILLD_SERVER_PREFIX_CACHE_METRICS_H_
#define PREFILLD_SERVER_PREFIX_CACHE_METRICS_H_

#include <utility>
#include <vector>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>

#include "model/prefill/prefill_engine.h"

namespace prometheus {
class Registry;
}  // namespace prometheus

namespace prefilld::server {

// Thread-compatible: one thread calls Set.
class PrefixCacheMetrics {
 public:
  // The registry is borrowed and must outlive this.
  explicit PrefixCacheMetrics(prometheus::Registry& registry);

  // Shows the use of the cache, which only ever counts up.
  void Set(const model::PrefixCacheUse& use);

 private:
  // One counter for each count of the index.
  std::vector<std::pair<int64_t model::PrefixCacheCounts::*, prometheus::Counter*>> counters_;
  prometheus::Counter& load_seconds_;
  prometheus::Gauge& bytes_;
  prometheus::Gauge& capacity_bytes_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PREFIX_CACHE_METRICS_H_
