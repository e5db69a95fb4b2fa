// The gRPC health service (grpc.health.v1) of a process.
//
// Readiness: the service "" and the process's own services serve while new requests are accepted.
// Liveness: the service "liveness" serves as long as work makes progress. It stops when the process
// is wedged, so that an orchestrator restarts it, but not because of a drain.
#ifndef PREFILLD_PROTO_PROCESS_HEALTH_H_
#define PREFILLD_PROTO_PROCESS_HEALTH_H_

#include <atomic>
#include <string>
#include <vector>

namespace grpc {
class HealthCheckServiceInterface;
}

namespace prefilld::process {

// Thread-safe.
class Health {
 public:
  // `service` belongs to the running gRPC server and must outlive this object. `names` are the full
  // names of the services that are ready together.
  Health(grpc::HealthCheckServiceInterface* service, std::vector<std::string> names);

  void SetReady(bool ready);
  void SetLive(bool live);
  bool ready() const { return ready_; }
  bool live() const { return live_; }

 private:
  grpc::HealthCheckServiceInterface* const service_;
  const std::vector<std::string> names_;
  std::atomic<bool> ready_ = false;
  std::atomic<bool> live_ = true;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_HEALTH_H_
