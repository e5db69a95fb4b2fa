// The page that Prometheus scrapes.
#ifndef PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_
#define PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

struct MHD_Daemon;

namespace prometheus {
class Collectable;
}  // namespace prometheus

namespace prefilld::process {

// Serves the collectables at http://<address>/metrics while it lives. It is one of their owners.
//
// One thread serves all connections and waits for none of them, so callers that say nothing, stop
// in the middle of a request or do not read the answer delay nobody. A connection is closed after 5
// seconds of silence, and when there are more than 64 the oldest one is closed, so that a new
// caller always gets in.
class MetricsEndpoint {
 public:
  // Starts the endpoint. The address is host:port with a name, an IPv4 address or an IPv6 address
  // in brackets; [::] takes IPv4 callers too. UNAVAILABLE, with the flag's name, when the address
  // cannot be bound.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Create(
      const std::string& address,
      std::vector<std::shared_ptr<prometheus::Collectable>> collectables);
  ~MetricsEndpoint();

  int port() const { return port_; }

 private:
  class Connections;

  MetricsEndpoint(std::vector<std::shared_ptr<prometheus::Collectable>> collectables, int port);

  // Takes over the listening socket.
  absl::Status Start(int socket);
  std::string Page() const;

  const std::vector<std::shared_ptr<prometheus::Collectable>> collectables_;
  const int port_;
  const std::unique_ptr<Connections> connections_;
  MHD_Daemon* daemon_ = nullptr;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_
