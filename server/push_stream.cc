#include "server/push_stream.h"

#include <atomic>
#include <utility>

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/client_callback.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "prefill/v1/receiver.pb.h"
#include "proto/wire/channel.h"
#include "proto/wire/grpc_status.h"
#include "proto/wire/socket_use.h"
#include "proto/wire/trace_context.h"
#include "server/grpc_encoding.h"
#include "server/request_log.h"
#include "server/transport.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr char kReceiveMethod[] = "/prefill.v1.KvReceiver/Receive";

}  // namespace

// Sends every message as a ReceiveRequest. It owns itself and is deleted when gRPC is done with the
// call. The method is client-streaming; on the wire that is a bidirectional stream with one
// response, which lets requests be encoded by hand.
class PushStream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                         public Transport {
 public:
  PushStream(std::shared_ptr<PrefillJob> job, LaneQueue* queue, const PushDialer& dialer,
             std::function<void()> on_done);
  void Start();

  void Send(Message message, bool last) override;
  void End(const absl::Status& status) override;
  void Cancel(const absl::Status& status) override { context_.TryCancel(); }
  std::optional<ConnectionUse> connection_use() const override;

 private:
  void OnWriteDone(bool ok) override;
  void OnReadDone(bool ok) override;
  void TakeHalf(int half);
  void OnDone(const grpc::Status& status) override;
  absl::Status CheckOutcome(const grpc::Status& status);

  const std::shared_ptr<PrefillJob> job_;
  LaneQueue* const queue_;
  const std::function<void()> on_done_;
  const std::shared_ptr<PushDialer::Open> open_;
  const wire::TraceContext span_;
  const absl::Time started_at_ = absl::Now();
  grpc::ClientContext context_;
  grpc::GenericStub stub_;
  grpc::ByteBuffer response_;
  // The queue asks for the use under its lock. Pushes to one receiver may share a connection.
  mutable wire::SocketsToPeer sockets_;

  // The last message counts as taken once it was written and the receiver has answered. Until then
  // its stall is timed and an abort finds the stream.
  enum Half : int { kWritten = 1, kAnswered = 2 };
  std::atomic<int> halves_ = 0;
  bool sending_last_ = false;   // written by Send, read when its write is done
  grpc::ByteBuffer under_way_;  // belongs to gRPC from Send to OnWriteDone

  bool sent_all_ = false;  // written by End; OnDone, which comes later, reads it
};

PushStream::PushStream(std::shared_ptr<PrefillJob> job, LaneQueue* queue, const PushDialer& dialer,
                       std::function<void()> on_done)
    : job_(std::move(job)),
      queue_(queue),
      on_done_(std::move(on_done)),
      open_(dialer.open_),
      span_(job_->work().caller.trace.Child()),
      stub_(wire::OpenPushChannel(job_->work().deliver_to.address(), dialer.credentials_,
                                  {.use_proxy = dialer.use_proxy_, .patience = dialer.patience_})) {
  {
    absl::MutexLock lock(&open_->mu);
    ++open_->calls;
  }
  for (const auto& [key, value] : span_.Metadata()) context_.AddMetadata(key, value);
  const absl::Duration time_left = job_->work().deadline - dialer.clock_.Now();
  if (time_left != absl::InfiniteDuration()) {
    context_.set_deadline(absl::ToChronoTime(absl::Now() + time_left));
  }
}

void PushStream::Start() {
  stub_.PrepareBidiStreamingCall(&context_, kReceiveMethod, {}, this);
  // The queue writes from threads other than gRPC's reactions. This hold delays OnDone until End.
  AddHold();
  StartRead(&response_);
  StartCall();

  // The first message opens the transfer.
  queue_->Push(AcceptedEvent(job_->work(), /*queue_position=*/0));
  queue_->Attach(this);
}

void PushStream::Send(Message message, bool last) {
  sending_last_ = last;
  under_way_ = EncodeReceiveRequest(std::move(message), job_->work().deliver_to.transfer_id());
  if (last) {
    StartWriteLast(&under_way_, grpc::WriteOptions());
  } else {
    StartWrite(&under_way_);
  }
}

void PushStream::End(const absl::Status& status) {
  if (status.ok()) {
    sent_all_ = true;
  } else {
    context_.TryCancel();
  }
  RemoveHold();
}

std::optional<Transport::ConnectionUse> PushStream::connection_use() const {
  const std::optional<int64_t> taken = sockets_.BytesTaken(context_.peer(), absl::Now());
  if (!taken.has_value()) return std::nullopt;
  absl::MutexLock lock(&open_->mu);
  return ConnectionUse{.bytes_taken = *taken, .most_streams = open_->calls};
}

// The queue may send the next message from another thread at once, so the buffer is cleared first.
void PushStream::OnWriteDone(bool ok) {
  under_way_.Clear();
  if (!sending_last_) return queue_->OnWriteDone(ok);
  if (!ok) queue_->Abort(absl::CancelledError("the stream broke"));
  TakeHalf(kWritten);
}

// The receiver responds once, at the end. A stream that ends without a response has failed; without
// this read the failure would go unnoticed until the next frame.
void PushStream::OnReadDone(bool ok) {
  if (!ok) queue_->Abort(absl::CancelledError("the receiver ended the call"));
  TakeHalf(kAnswered);
}

void PushStream::TakeHalf(int half) {
  if ((halves_.fetch_or(half) | half) == (kWritten | kAnswered)) queue_->OnWriteDone(true);
}

void PushStream::OnDone(const grpc::Status& status) {
  const absl::Status result = CheckOutcome(status);
  LogPush(job_->work(), span_, absl::Now() - started_at_, job_->delivery().sent().bytes, result);
  if (result.ok()) {
    job_->delivery().OnSideLaneDone(/*lane=*/0);
    if (job_->work().receiver > 0) job_->OnResultSent();
  } else {
    job_->Abort(Outcome::kReceiverFailed,
                wire::WithPrefix(
                    absl::StrCat("deliver_to ", job_->work().deliver_to.address(), ": "), result));
  }
  if (on_done_ != nullptr) on_done_();
  const std::shared_ptr<PushDialer::Open> open = open_;
  delete this;
  absl::MutexLock lock(&open->mu);
  --open->calls;
}

absl::Status PushStream::CheckOutcome(const grpc::Status& status) {
  if (!status.ok()) return wire::FromGrpc(status);
  v1::ReceiveResponse response;
  if (!sent_all_ ||
      !grpc::SerializationTraits<v1::ReceiveResponse>::Deserialize(&response_, &response).ok()) {
    return absl::DataLossError("ended before the last frame");
  }
  const auto sent_bytes = static_cast<uint64_t>(job_->delivery().sent().bytes);
  if (response.kv_bytes() != sent_bytes) {
    return absl::DataLossError(
        absl::StrCat("stored ", response.kv_bytes(), " bytes of KV; ", sent_bytes, " were sent"));
  }
  return absl::OkStatus();
}

PushDialer::PushDialer(std::shared_ptr<grpc::ChannelCredentials> credentials, bool use_proxy,
                       const Clock& clock, absl::Duration stall_timeout)
    : credentials_(std::move(credentials)),
      use_proxy_(use_proxy),
      clock_(clock),
      patience_(2 * stall_timeout + absl::Seconds(30)) {}

void PushDialer::Start(std::shared_ptr<PrefillJob> job, std::function<void()> on_done) {
  const auto lane = job->delivery().side_lane(0);
  if (!lane.ok()) return;  // not a push
  lookup_.Log(job->work().id, job->work().deliver_to.address());
  (new PushStream(std::move(job), *lane, *this, std::move(on_done)))->Start();
}

void PushDialer::AwaitIdle() {
  absl::MutexLock lock(&open_->mu);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(open_->mu) { return open_->calls == 0; };
  open_->mu.Await(absl::Condition(&idle));
}

}  // namespace prefilld::server
