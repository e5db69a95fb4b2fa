// The response stream of a call, as a transport: the Prefill call itself or a lane.
#ifndef PREFILLD_SERVER_SERVER_STREAM_H_
#define PREFILLD_SERVER_SERVER_STREAM_H_

#include <memory>
#include <optional>

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "server/lane_queue.h"
#include "server/transport.h"

namespace prefilld::wire {
class Connection;
}

namespace prefilld::server {

// Sends every message as a PrefillEvent. It owns itself and is deleted when gRPC is done with the
// call.
class ServerStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer>, public Transport {
 public:
  struct Events {
    // Called when the peer has cancelled or is gone, unless the queue waits for it to come back.
    absl::AnyInvocable<void()> on_cancel;
    // Called when everything has been sent and this status is about to follow.
    absl::AnyInvocable<void(const absl::Status&)> on_end;
    // Called when the call is over, with the status by which the queue ended it. May be null.
    absl::AnyInvocable<void(const absl::Status&)> on_done = nullptr;
  };

  // The creator attaches the stream to the queue. `connection` may be null: then nobody knows how
  // much the connection takes.
  ServerStream(grpc::CallbackServerContext* context, LaneQueue* queue,
               std::shared_ptr<const wire::Connection> connection, Events events);

  void Send(Message message, bool last) override;
  void End(const absl::Status& status) override;
  void Cancel(const absl::Status& status) override;
  std::optional<ConnectionUse> connection_use() const override;

 private:
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  grpc::CallbackServerContext* const context_;
  LaneQueue* const queue_;
  const std::shared_ptr<const wire::Connection> connection_;  // co-owned by its other calls
  Events events_;
  absl::Status end_;            // written by End; OnDone, which comes later, reads it
  grpc::ByteBuffer under_way_;  // belongs to gRPC from Send to OnWriteDone
};

// Attaches the stream of the call that brought a request. If its caller has come again meanwhile,
// that stream stays and this one ends.
void AttachFirst(LaneQueue& queue, ServerStream* stream);

// Returns a stream that ends at once with `status`.
grpc::ServerWriteReactor<grpc::ByteBuffer>* RefuseStream(const absl::Status& status);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SERVER_STREAM_H_
