// The gRPC health service (grpc.health.v1) of a process.
//
// Readiness: the service "" and the process's own services serve while new requests are accepted.
// Liveness: the service "liveness" serves as long as work makes progress and new callers get in. It
// stops when the process is wedged or deaf, so that an orchestrator restarts it, but not because of
// a drain.
#ifndef PREFILLD_PROTO_PROCESS_HEALTH_H_
#define PREFILLD_PROTO_PROCESS_HEALTH_H_

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

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
  void SetProgressing(bool progressing);  // work does not wait in vain
  void SetReachable(bool reachable);      // a new connection is answered
  bool ready() const { return ready_; }
  bool live() const { return *live_; }
  // Returns what live() reads, for those who may outlive this.
  std::shared_ptr<const std::atomic<bool>> live_flag() const { return live_; }
  bool progressing() const;

 private:
  void UpdateLive() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  grpc::HealthCheckServiceInterface* const service_;
  const std::vector<std::string> names_;
  std::atomic<bool> ready_ = false;
  const std::shared_ptr<std::atomic<bool>> live_ = std::make_shared<std::atomic<bool>>(true);

  mutable absl::Mutex mu_;
  bool progressing_ ABSL_GUARDED_BY(mu_) = true;
  bool reachable_ ABSL_GUARDED_BY(mu_) = true;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_HEALTH_H_
