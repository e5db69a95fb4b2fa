#ifndef PREFILLD_CLIENT_DECODE_WORKER_GENERATE_SERVICE_H_
#define PREFILLD_CLIENT_DECODE_WORKER_GENERATE_SERVICE_H_

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/decode_worker/generation.h"
#include "grpcpp/support/server_callback.h"
#include "prefill/v1/decode.grpc.pb.h"
#include "proto/wire/arrivals.h"

namespace prefilld::client {

// The gRPC service prefill.v1.DecodeService. Each request has a thread of its own; at most
// max_requests run.
class GenerateService : public wire::WithArrivals<::prefill::v1::DecodeService::CallbackService> {
 public:
  // `arrivals` bounds the time that a request may take to arrive.
  GenerateService(const WorkerContext& worker, wire::Arrivals& arrivals);
  // All requests must have ended, which shutting the server down ensures.
  ~GenerateService() override;

  grpc::ServerWriteReactor<::prefill::v1::GenerateEvent>* Generate(
      grpc::CallbackServerContext* context, const ::prefill::v1::GenerateRequest* request) override;

  // Answers new requests UNAVAILABLE from now on and waits for those that run. True when all of
  // them ended in time.
  bool Drain(absl::Duration timeout);

 private:
  class Call;

  absl::Status Admit();
  void Leave();

  const WorkerContext worker_;
  absl::Mutex mu_;
  int running_ ABSL_GUARDED_BY(mu_) = 0;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_GENERATE_SERVICE_H_
