#ifndef PREFILLD_SERVER_SHARED_MEMORY_METRICS_H_
#define PREFILLD_SERVER_SHARED_MEMORY_METRICS_H_

#include <array>
#include <cstdint>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>

namespace prometheus {
class Registry;
}  // namespace prometheus

namespace prefilld::server {

// The metrics of KV in shared memory, and of what goes over gRPC instead. Thread-safe.
class SharedMemoryMetrics {
 public:
  // How a connection to a socket went.
  enum class Visitor : uint8_t {
    kAttached,
    kRefused,    // no such request, or not its key
    kNoMemory,   // the limit is reached, or the system's
    kBrokenOff,  // before the memory was mapped
    kTooMany,    // closed, because as many as may had shown no key
  };

  explicit SharedMemoryMetrics(prometheus::Registry& registry);

  void Count(Visitor visitor) { visitors_[static_cast<size_t>(visitor)]->Increment(); }
  void CountFrame(int64_t payload_bytes, bool is_shared) {
    (is_shared ? shared_bytes_ : grpc_bytes_)->Increment(static_cast<double>(payload_bytes));
  }
  void SetUse(int64_t bytes) { use_.Set(static_cast<double>(bytes)); }
  void SetLimit(int64_t bytes) { limit_.Set(static_cast<double>(bytes)); }

 private:
  std::array<prometheus::Counter*, 5> visitors_;
  prometheus::Counter* shared_bytes_;
  prometheus::Counter* grpc_bytes_;
  prometheus::Gauge& use_;
  prometheus::Gauge& limit_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_MEMORY_METRICS_H_
