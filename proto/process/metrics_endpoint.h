// The page that Prometheus scrapes.
#ifndef PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_
#define PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace prometheus {
class Collectable;
class Exposer;
}  // namespace prometheus

namespace prefilld::process {

// Serves the collectables at http://<address>/metrics while it lives. It is one of their owners.
class MetricsEndpoint {
 public:
  // Starts the endpoint. UNAVAILABLE, with the flag's name, when the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Create(
      const std::string& address,
      std::vector<std::shared_ptr<prometheus::Collectable>> collectables);
  ~MetricsEndpoint();

  int port() const { return port_; }

 private:
  MetricsEndpoint(std::unique_ptr<prometheus::Exposer> exposer,
                  std::vector<std::shared_ptr<prometheus::Collectable>> collectables, int port);

  // The exposer refers to the collectables, so it is destroyed first.
  const std::vector<std::shared_ptr<prometheus::Collectable>> collectables_;
  const std::unique_ptr<prometheus::Exposer> exposer_;
  const int port_;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_METRICS_ENDPOINT_H_
