#ifndef PREFILLD_CLIENT_DECODE_WORKER_METRICS_H_
#define PREFILLD_CLIENT_DECODE_WORKER_METRICS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace prometheus {
class Collectable;
class Registry;
}  // namespace prometheus

namespace prefilld::client {

// The numbers that a worker shows to Prometheus. Thread-safe.
class WorkerMetrics {
 public:
  WorkerMetrics();
  ~WorkerMetrics();

  void RequestStarted();
  void RequestEnded(const absl::Status& status);
  void CountTransfer(uint64_t kv_bytes, const absl::Status& status);
  // Counts a pull by its transport, and logs why it is gRPC, once for each reason.
  void CountPull(const absl::Status& shared_memory);
  void CountToken();
  void CountIgnoredTrace();
  void ObserveTimeToFirstToken(absl::Duration ttft);
  // Shows the pool's size and use. `free_blocks` is called at every scrape while this lives.
  void WatchPool(int64_t num_blocks, std::function<int64_t()> free_blocks);

  const std::shared_ptr<prometheus::Registry>& registry() const;

  // Serves /metrics, `more` included, and /live (MetricsEndpoint) on host:port and returns the
  // port; 0 without an address. UNAVAILABLE: the address cannot be bound.
  absl::StatusOr<int> Serve(const std::string& address,
                            std::shared_ptr<prometheus::Collectable> more,
                            std::shared_ptr<const std::atomic<bool>> live);

 private:
  struct Families;
  const std::unique_ptr<Families> families_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_METRICS_H_
