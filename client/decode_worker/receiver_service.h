#ifndef PREFILLD_CLIENT_DECODE_WORKER_RECEIVER_SERVICE_H_
#define PREFILLD_CLIENT_DECODE_WORKER_RECEIVER_SERVICE_H_

#include "client/decode_worker/pushed_stream.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "prefill/v1/receiver.grpc.pb.h"

namespace prefilld::client {

// The gRPC service prefill.v1.KvReceiver, which takes pushed caches for the requests that wait for
// them. It reads messages undecoded, so that payloads are not copied on their way to the pool.
class ReceiverService : public ::prefill::v1::KvReceiver::WithRawCallbackMethod_Receive<
                            ::prefill::v1::KvReceiver::WithRawCallbackMethod_ReceiveLane<
                                ::prefill::v1::KvReceiver::Service>> {
 public:
  explicit ReceiverService(const PushSurroundings& surroundings) : surroundings_(surroundings) {}

  grpc::ServerReadReactor<grpc::ByteBuffer>* Receive(grpc::CallbackServerContext* context,
                                                     grpc::ByteBuffer* response) override;
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* ReceiveLane(
      grpc::CallbackServerContext* context) override;

 private:
  const PushSurroundings surroundings_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_RECEIVER_SERVICE_H_
