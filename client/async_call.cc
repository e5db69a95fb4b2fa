#include "client/async_call.h"

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/reception.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/client_callback.h"
#include "grpcpp/support/slice.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;

// gRPC calls the methods that begin with On, one at a time. The call keeps itself alive until the
// last of them.
class AsyncCall final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                        public StartedPrefill {
 public:
  AsyncCall(const PrefillRequest& request, KvSink& sink, const PrefillCallOptions& options,
            PrefillDone done)
      : reception_(request, sink, /*max_lanes=*/1), done_(std::move(done)) {
    for (const auto& [key, value] : options.metadata) context_.AddMetadata(key, value);
    if (options.deadline != absl::InfiniteFuture()) {
      context_.set_deadline(absl::ToChronoTime(options.deadline));
    }
    const grpc::Slice bytes(request.SerializeAsString());
    request_ = grpc::ByteBuffer(&bytes, 1);
  }

  void Start(const std::shared_ptr<grpc::Channel>& channel, std::shared_ptr<AsyncCall> self) {
    self_ = std::move(self);
    grpc::GenericStub(channel).PrepareBidiStreamingCall(&context_, kPrefillMethod, {}, this);
    StartWriteLast(&request_, grpc::WriteOptions());
    StartRead(&message_);
    StartCall();
  }

  void Cancel() override { Fail(absl::CancelledError("cancelled by the caller")); }

 private:
  // Keeps the first reason.
  void Fail(absl::Status reason) {
    {
      absl::MutexLock lock(&mu_);
      if (!status_.ok()) return;
      status_ = std::move(reason);
    }
    context_.TryCancel();
  }

  void OnWriteDone(bool) override { request_.Clear(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (absl::Status taken = reception_.Take(0, message_); !taken.ok()) {
      return Fail(std::move(taken));
    }
    StartRead(&message_);
  }

  void OnDone(const grpc::Status& status) override {
    std::shared_ptr<AsyncCall> self = std::move(self_);  // the last one, perhaps
    absl::Status ended;
    {
      absl::MutexLock lock(&mu_);
      ended = status_.ok() ? EndOfStream(wire::FromGrpc(status)) : status_;
    }
    absl::StatusOr<PrefillResult> result =
        ended.ok() ? reception_.Finish() : absl::StatusOr<PrefillResult>(ended);
    PrefillDone done = std::move(done_);
    // The call gives up its share of the channel first. Once `done` was called the client may go,
    // and gRPC would shut itself down on this thread of its own if the call were the last to hold
    // it.
    self.reset();
    std::move(done)(std::move(result));
  }

  grpc::ClientContext context_;
  grpc::ByteBuffer request_;
  grpc::ByteBuffer message_;
  Reception reception_;
  PrefillDone done_;
  std::shared_ptr<AsyncCall> self_;

  absl::Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

std::shared_ptr<StartedPrefill> StartAsyncCall(const std::shared_ptr<grpc::Channel>& channel,
                                               const PrefillRequest& request, KvSink& sink,
                                               const PrefillCallOptions& options,
                                               PrefillDone done) {
  auto call = std::make_shared<AsyncCall>(request, sink, options, std::move(done));
  call->Start(channel, call);
  return call;
}

absl::Status EndOfStream(absl::Status status) {
  if (absl::IsCancelled(status)) return absl::UnavailableError("the server cancelled the call");
  return status;
}

}  // namespace prefilld::client
