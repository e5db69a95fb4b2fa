// The page that Prometheus scrapes.
#ifndef PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_
#define PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

struct MHD_Daemon;

namespace prometheus {
class Collectable;
}  // namespace prometheus

namespace prefilld::process {

// Serves the collectables at http://<address>/metrics while it lives. It is one of their owners.
// At /live it says what Health's service "liveness" says, to those whom TLS would keep from asking
// that: an orchestrator must not end a process because its certificate has expired.
//
// One thread serves all connections and waits for none of them, so callers that say nothing, stop
// in the middle of a request or do not read the answer delay nobody. A connection is closed after 5
// seconds of silence, and when there are more than 64 the oldest one is closed, so that a new
// caller always gets in.
class MetricsEndpoint {
 public:
  // Starts the endpoint. `live` is that of Health; null: there is no /live. The address is
  // host:port with a name, an IPv4 address or an IPv6 address in brackets; [::] takes IPv4 callers
  // too. UNAVAILABLE, with the flag's name, when the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Create(
      const std::string& address,
      std::vector<std::shared_ptr<prometheus::Collectable>> collectables,
      std::shared_ptr<const std::atomic<bool>> live = nullptr);
  ~MetricsEndpoint();

  int port() const { return port_; }

  // Waits until somebody has read a page that was made after the call, but not longer than
  // `timeout`, and not at all if nobody has read one during the last two minutes.
  void AwaitReader(absl::Duration timeout);

 private:
  class Connections;

  MetricsEndpoint(std::vector<std::shared_ptr<prometheus::Collectable>> collectables,
                  std::shared_ptr<const std::atomic<bool>> live, int port);

  // Takes over the listening socket.
  absl::Status Start(int socket);
  std::string Page() const;
  void PageWasRead(int64_t number);

  const std::vector<std::shared_ptr<prometheus::Collectable>> collectables_;
  const std::shared_ptr<const std::atomic<bool>> live_;
  const int port_;
  const std::unique_ptr<Connections> connections_;
  MHD_Daemon* daemon_ = nullptr;

  absl::Mutex mu_;
  int64_t pages_made_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t last_page_read_ ABSL_GUARDED_BY(mu_) = 0;  // its number, from 1 on
  absl::Time last_reading_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_
