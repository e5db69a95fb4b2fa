// grpc.health.v1 and what stands behind it.
//
// Readiness: the services "" and "prefill.v1.PrefillService" serve while new requests are accepted.
// Liveness: the service "liveness" serves as long as work makes progress; it stops when the
// server is wedged, so that an orchestrator restarts it, and not because of a drain.
#ifndef PREFILLD_SERVER_HEALTH_H_
#define PREFILLD_SERVER_HEALTH_H_

#include <atomic>

namespace grpc {
class HealthCheckServiceInterface;
}

namespace prefilld::server {

// Thread-safe.
class Health {
 public:
  // `service` is the running gRPC server's; it outlives this object.
  explicit Health(grpc::HealthCheckServiceInterface* service);

  void SetReady(bool ready);
  void SetLive(bool live);
  bool ready() const { return ready_; }
  bool live() const { return live_; }

 private:
  grpc::HealthCheckServiceInterface* const service_;
  std::atomic<bool> ready_ = false;
  std::atomic<bool> live_ = true;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_HEALTH_H_
