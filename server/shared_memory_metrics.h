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
  // How a connection to a socket, or a further request on one, began.
  enum class Visitor : uint8_t {
    kAttached,       // with a memory that it brought
    kAttachedAgain,  // for a further request
    kRefused,        // no such request, not its key, or attached before
    kUnfit,          // the memory that it brought is not as it has to be
    kNoMemory,       // the limit is reached, or the system's
    kBrokenOff,      // before the memory was in use
    kTooMany,        // closed, because as many as may had shown no key
  };

  explicit SharedMemoryMetrics(prometheus::Registry& registry);

  void Count(Visitor visitor) { visitors_[static_cast<size_t>(visitor)]->Increment(); }
  void CountFrame(int64_t payload_bytes, bool is_shared) {
    (is_shared ? shared_bytes_ : grpc_bytes_)->Increment(static_cast<double>(payload_bytes));
  }
  void SetUse(int64_t bytes, int64_t attachments) {
    use_.Set(static_cast<double>(bytes));
    attachments_.Set(static_cast<double>(attachments));
  }
  void SetLimit(int64_t bytes) { limit_.Set(static_cast<double>(bytes)); }

 private:
  std::array<prometheus::Counter*, 7> visitors_;
  prometheus::Counter* shared_bytes_;
  prometheus::Counter* grpc_bytes_;
  prometheus::Gauge& use_;
  prometheus::Gauge& attachments_;
  prometheus::Gauge& limit_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_MEMORY_METRICS_H_
