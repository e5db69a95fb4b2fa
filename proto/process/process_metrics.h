// The use of memory, descriptors and cores by this process.
#ifndef PREFILLD_PROTO_PROCESS_PROCESS_METRICS_H_
#define PREFILLD_PROTO_PROCESS_PROCESS_METRICS_H_

#include <memory>

namespace prometheus {
class Collectable;
}  // namespace prometheus

namespace prefilld::process {

// Returns the metrics that Prometheus's own clients have of every process, under the names that
// dashboards expect, read when they are scraped: process_resident_memory_bytes, process_open_fds,
// process_max_fds, process_cpu_seconds_total and process_start_time_seconds. One that cannot be
// read is left out.
std::shared_ptr<prometheus::Collectable> ProcessMetrics();

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_PROCESS_METRICS_H_
