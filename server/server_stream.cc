#include "server/server_stream.h"

#include <utility>

#include <grpc/grpc.h>

#include "proto/wire/connections.h"
#include "proto/wire/grpc_status.h"
#include "server/grpc_encoding.h"

namespace prefilld::server {
namespace {

class RefusedStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  explicit RefusedStream(const absl::Status& status) { Finish(wire::ToGrpc(status)); }

 private:
  void OnDone() override { delete this; }
};

}  // namespace

ServerStream::ServerStream(grpc::CallbackServerContext* context, LaneQueue* queue,
                           std::shared_ptr<const wire::Connection> connection, Events events)
    : context_(context),
      queue_(queue),
      connection_(std::move(connection)),
      events_(std::move(events)) {}

// Every stream of a connection co-owns it.
std::optional<Transport::ConnectionUse> ServerStream::connection_use() const {
  if (connection_ == nullptr) return std::nullopt;
  return ConnectionUse{.bytes_taken = connection_->BytesTaken(),
                       .most_streams = connection_.use_count()};
}

void ServerStream::Send(Message message, bool last) {
  under_way_ = EncodeEvent(std::move(message));
  StartWrite(&under_way_);
}

void ServerStream::End(const absl::Status& status) {
  events_.on_end(status);
  end_ = status;
  Finish(wire::ToGrpc(status));
}

// Finish would wait behind the message that the peer does not take. Cancelling the core call sends
// the status at once and drops the message with the staging buffer that it borrows.
void ServerStream::Cancel(const absl::Status& status) {
  const grpc::Status grpc_status = wire::ToGrpc(status);
  grpc_call_cancel_with_status(context_->c_call(),
                               static_cast<grpc_status_code>(grpc_status.error_code()),
                               grpc_status.error_message().c_str(), nullptr);
}

// The queue may send the next message from another thread at once, so the buffer is cleared first.
void ServerStream::OnWriteDone(bool ok) {
  under_way_.Clear();
  queue_->OnWriteDone(ok);
}

void ServerStream::OnCancel() {
  if (!queue_->OnPeerGone(this)) events_.on_cancel();
}

void ServerStream::OnDone() {
  if (events_.on_done != nullptr) events_.on_done(end_);
  delete this;
}

void AttachFirst(LaneQueue& queue, ServerStream* stream) {
  if (queue.Attach(stream)) return;
  stream->End(absl::AbortedError("another stream has taken this one's place"));
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* RefuseStream(const absl::Status& status) {
  return new RefusedStream(status);
}

}  // namespace prefilld::server
