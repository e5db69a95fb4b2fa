// The health service of gRPC (grpc.health.v1), for servers that bound the arrival of requests.
#ifndef PREFILLD_PROTO_WIRE_HEALTH_SERVICE_H_
#define PREFILLD_PROTO_WIRE_HEALTH_SERVICE_H_

#include <string>

#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/service_type.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "proto/wire/arrivals.h"

namespace prefilld::wire {

// Does what gRPC's own one does, which waits for a request for as long as its connection lives: a
// service has the status that was set last, and Watch sends it again whenever it changes. The whole
// server, under the name "", starts out serving. Thread-safe.
class HealthService final : public grpc::Service, public grpc::HealthCheckServiceInterface {
 public:
  // `arrivals` must outlive the server.
  explicit HealthService(Arrivals& arrivals);

  void SetServingStatus(const std::string& name, bool serving) override;
  void SetServingStatus(bool serving) override;  // of all names
  void Shutdown() override { SetServingStatus(false); }

 private:
  class WatchCall;
  // The values of HealthCheckResponse.ServingStatus.
  enum class Status : char { kServing = 1, kNotServing = 2, kServiceUnknown = 3 };

  static grpc::ByteBuffer Response(Status status);

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request, grpc::ByteBuffer* response);
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Watch(const grpc::ByteBuffer* request);
  Status StatusOf(const std::string& name) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  mutable absl::Mutex mu_;
  absl::btree_map<std::string, Status> statuses_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_set<WatchCall*> watches_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_HEALTH_SERVICE_H_
