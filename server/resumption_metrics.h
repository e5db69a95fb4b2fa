// The metrics of transfers that outlive their connections.
#ifndef PREFILLD_SERVER_RESUMPTION_METRICS_H_
#define PREFILLD_SERVER_RESUMPTION_METRICS_H_

#include <cstdint>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>

namespace prometheus {
class Registry;
}  // namespace prometheus

namespace prefilld::server {

// Windows that have expired are requests whose outcome is not_resumed. Thread-safe.
class ResumptionMetrics {
 public:
  explicit ResumptionMetrics(prometheus::Registry& registry);

  void CountResumed(int64_t frames_again);  // a stream, and the frames that it brings once more
  void CountDamaged(int64_t frames);        // sent once more because they arrived damaged
  void CountRefused();                      // a request that may not wait
  void CountPlainPush();                    // to a receiver that acknowledges nothing
  // Requests whose consumer is away, and the frames of all that may be resumed.
  void SetWaiting(int64_t requests, int64_t held_bytes, int64_t retained_frames);

 private:
  prometheus::Counter& streams_;
  prometheus::Counter& frames_of_streams_;
  prometheus::Counter& frames_damaged_;
  prometheus::Counter& refused_;
  prometheus::Counter& plain_pushes_;
  prometheus::Gauge& waiting_;
  prometheus::Gauge& waiting_bytes_;
  prometheus::Gauge& retained_frames_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_RESUMPTION_METRICS_H_
