// The gRPC service prefill.v1.ResumptionService: acknowledgements, streams in place of broken ones,
// and explicit cancels.
#ifndef PREFILLD_SERVER_RESUMPTION_SERVICE_H_
#define PREFILLD_SERVER_RESUMPTION_SERVICE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "absl/status/statusor.h"
#include "prefill/v1/resumption.grpc.pb.h"
#include "proto/wire/arrivals.h"

namespace prefilld::wire {
class Connections;
}  // namespace prefilld::wire

namespace prefilld::server {

class Metrics;
class PrefillJob;
class Scheduler;

using ResumptionServiceBase =
    wire::WithArrivals<::prefill::v1::ResumptionService::WithRawCallbackMethod_Resume<
        ::prefill::v1::ResumptionService::WithCallbackMethod_Acknowledge<
            ::prefill::v1::ResumptionService::WithCallbackMethod_Cancel<
                ::prefill::v1::ResumptionService::Service>>>>;

// Thread-safe, as gRPC calls it.
class ResumptionService final : public ResumptionServiceBase {
 public:
  // All are borrowed. `arrivals` bounds the time that a request may take to arrive.
  ResumptionService(Scheduler& scheduler, Metrics& metrics, wire::Arrivals& arrivals);

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Resume(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Acknowledge(grpc::CallbackServerContext* context,
                                        const ::prefill::v1::AcknowledgeRequest* request,
                                        ::prefill::v1::AcknowledgeResponse* response) override;
  grpc::ServerUnaryReactor* Cancel(grpc::CallbackServerContext* context,
                                   const ::prefill::v1::CancelRequest* request,
                                   ::prefill::v1::CancelResponse* response) override;

  // Lets streams see how much their connections take.
  void SetConnections(const wire::Connections* connections) { connections_ = connections; }

 private:
  // Finds the request, or further receiver of one, that a message names.
  template <typename Message>
  absl::StatusOr<std::shared_ptr<PrefillJob>> Find(const Message& message) const;
  absl::Status Take(const ::prefill::v1::AcknowledgeRequest& request);
  // Counts a refused call and logs it.
  void NoteRefused(const char* method, const std::string& request_id,
                   const grpc::CallbackServerContext& context, const absl::Status& status) const;
  grpc::ServerUnaryReactor* Answer(const char* method, const std::string& request_id,
                                   grpc::CallbackServerContext* context,
                                   const absl::Status& status) const;

  Scheduler& scheduler_;
  Metrics& metrics_;
  std::atomic<const wire::Connections*> connections_ = nullptr;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_RESUMPTION_SERVICE_H_
