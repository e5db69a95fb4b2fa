#include "server/shared_memory_metrics.h"

#include <string>

#include <prometheus/registry.h>

namespace prefilld::server {
namespace {

constexpr std::array<const char*, 7> kVisitors = {"attached",  "attached_again", "refused", "unfit",
                                                  "no_memory", "broken_off",     "too_many"};

prometheus::Gauge& NewSharedMemoryGauge(prometheus::Registry& registry, const std::string& name,
                                        const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

}  // namespace

SharedMemoryMetrics::SharedMemoryMetrics(prometheus::Registry& registry)
    : use_(NewSharedMemoryGauge(registry, "prefilld_shared_memory_bytes",
                                "Memory of consumers of this host that is mapped for their KV.")),
      attachments_(NewSharedMemoryGauge(registry, "prefilld_shared_memory_attachments",
                                        "Memories of consumers that are mapped.")),
      limit_(NewSharedMemoryGauge(registry, "prefilld_shared_memory_limit_bytes",
                                  "Memory of consumers that may be mapped in all; 0: it is "
                                  "off.")) {
  auto& visitors = prometheus::BuildCounter()
                       .Name("prefilld_shared_memory_connections_total")
                       .Help("Consumers that came for shared memory, by how that went.")
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
