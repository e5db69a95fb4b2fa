#ifndef PREFILLD_CLIENT_DECODE_WORKER_RECEIVER_SERVICE_H_
#define PREFILLD_CLIENT_DECODE_WORKER_RECEIVER_SERVICE_H_

#include "absl/time/time.h"
#include "client/decode_worker/metrics.h"
#include "client/decode_worker/pending_transfers.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "prefill/v1/receiver.grpc.pb.h"
#include "proto/wire/arrivals.h"

namespace prefilld::client {

// The gRPC service prefill.v1.KvReceiver, which takes pushed caches for the requests that wait for
// them. It reads messages undecoded, so that payloads are not copied on their way to the pool.
class ReceiverService : public ::prefill::v1::KvReceiver::WithRawCallbackMethod_Receive<
                            ::prefill::v1::KvReceiver::Service> {
 public:
  // All pointers are borrowed. A stream whose ReceiveOpen does not come within `open_timeout` is
  // ended. `arrivals` hears of calls.
  ReceiverService(PendingTransfers* transfers, absl::Duration open_timeout, WorkerMetrics* metrics,
                  wire::Arrivals* arrivals)
      : transfers_(transfers),
        open_timeout_(open_timeout),
        metrics_(metrics),
        arrivals_(arrivals) {}

  grpc::ServerReadReactor<grpc::ByteBuffer>* Receive(grpc::CallbackServerContext* context,
                                                     grpc::ByteBuffer* response) override;

 private:
  PendingTransfers* const transfers_;
  const absl::Duration open_timeout_;
  WorkerMetrics* const metrics_;
  wire::Arrivals* const arrivals_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_RECEIVER_SERVICE_H_
