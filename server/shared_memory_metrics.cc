#include "server/shared_memory_metrics.h"

#include <string>

#include <prometheus/registry.h>

namespace prefilld::server {
namespace {

constexpr std::array<const char*, 5> kVisitors = {"attached", "refused", "no_memory", "broken_off",
                                                  "too_many"};

prometheus::Gauge& NewSharedMemoryGauge(prometheus::Registry& registry, const std::string& name,
                                        const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

}  // namespace

SharedMemoryMetrics::SharedMemoryMetrics(prometheus::Registry& registry)
    : use_(NewSharedMemoryGauge(registry, "prefilld_shared_memory_bytes",
                                "Shared memory of the requests that have some.")),
      limit_(NewSharedMemoryGauge(registry, "prefilld_shared_memory_limit_bytes",
                                  "Shared memory that all requests may have together; 0: it is "
                                  "off.")) {
  auto& visitors = prometheus::BuildCounter()
                       .Name("prefilld_shared_memory_connections_total")
                       .Help("Connections to the sockets of shared memory, by how they went.")
                       .Register(registry);
  for (size_t i = 0; i < kVisitors.size(); ++i) {
    visitors_[i] = &visitors.Add({{"result", kVisitors[i]}});
  }
  auto& bytes = prometheus::BuildCounter()
                    .Name("prefilld_kv_transport_bytes_total")
                    .Help("KV payload handed to the transport, by the transport.")
                    .Register(registry);
  shared_bytes_ = &bytes.Add({{"transport", "shared_memory"}});
  grpc_bytes_ = &bytes.Add({{"transport", "grpc"}});
}

}  // namespace prefilld::server
