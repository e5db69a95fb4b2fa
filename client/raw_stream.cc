#include "client/raw_stream.h"

#include <utility>

#include "absl/time/clock.h"
#include "grpcpp/channel.h"
#include "grpcpp/support/slice.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {

RawStream::RawStream(std::shared_ptr<grpc::Channel> channel) : stub_(std::move(channel)) {}

void RawStream::Start(const std::string& method, const google::protobuf::MessageLite& request,
                      absl::Time deadline,
                      const std::vector<std::pair<std::string, std::string>>& metadata) {
  for (const auto& [key, value] : metadata) context_.AddMetadata(key, value);
  if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
  call_ = stub_.PrepareCall(&context_, method, &queue_);
  call_->StartCall(this);
  open_ = WaitForOperation();
  if (!open_) return;
  const grpc::Slice bytes(request.SerializeAsString());
  call_->Write(grpc::ByteBuffer(&bytes, 1), grpc::WriteOptions().set_last_message(), this);
  open_ = WaitForOperation();
}

RawStream::~RawStream() {
  if (call_ != nullptr && !finished_) {
    // gRPC requires that the end of every call is awaited.
    context_.TryCancel();
    (void)Finish();
  }
  queue_.Shutdown();
  void* tag;
  bool ok;
  while (queue_.Next(&tag, &ok)) {
  }
}

// At most one operation is under way.
bool RawStream::WaitForOperation() {
  void* tag;
  bool ok = false;
  return queue_.Next(&tag, &ok) && ok;
}

bool RawStream::Read(grpc::ByteBuffer& message) {
  if (!open_) return false;
  call_->Read(&message, this);
  open_ = WaitForOperation();
  return open_;
}

absl::Status RawStream::Finish() {
  grpc::Status status;
  call_->Finish(&status, this);
  WaitForOperation();
  finished_ = true;
  open_ = false;
  return wire::FromGrpc(status);
}

}  // namespace prefilld::client
