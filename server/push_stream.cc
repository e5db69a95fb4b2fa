#include "server/push_stream.h"

#include <grpcpp/impl/codegen/proto_utils.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "proto/wire/frame_codec.h"
#include "proto/wire/grpc_status.h"
#include "server/grpc_encoding.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr char kReceiveLaneMethod[] = "/prefill.v1.KvReceiver/ReceiveLane";
constexpr char kReceiveMethod[] = "/prefill.v1.KvReceiver/Receive";

// The search for each takes time in proportion to the frames that a request may hold.
constexpr int kMaxDamagedInReceipt = 64;

absl::Status Broken() { return absl::CancelledError("the receiver ended the call"); }

}  // namespace

PushStream::PushStream(LaneQueue* queue, Call call, Events events)
    : queue_(queue),
      call_(std::move(call)),
      events_(std::move(events)),
      stub_(std::move(call_.channel)),
      parts_(call_.method == Method::kReceive ? kOpenAnswered : 0) {
  for (const auto& [key, value] : call_.metadata) context_.AddMetadata(key, value);
  if (call_.deadline != absl::InfiniteFuture()) {
    context_.set_deadline(absl::ToChronoTime(call_.deadline));
  }
}

void PushStream::Start(LaneQueue* queue, Call call, Events events) {
  auto* stream = new PushStream(queue, std::move(call), std::move(events));
  const bool has_receipts = stream->call_.method == Method::kReceiveLane;
  stream->stub_.PrepareBidiStreamingCall(
      &stream->context_, has_receipts ? kReceiveLaneMethod : kReceiveMethod, {}, stream);
  // The queue writes from threads other than gRPC's reactions. This hold delays OnDone until End.
  stream->AddHold();
  stream->StartRead(&stream->response_);

  v1::PrefillEvent opening;  // Send puts ReceiveOpen in its place
  opening.mutable_accepted();
  const auto attached =
      queue->Resume(stream, has_receipts ? std::nullopt : std::optional<uint64_t>(0), opening);
  if (!attached.ok()) stream->End(attached.status());
  // gRPC keeps what was started before. The call may end at once, and the queue must know it then.
  stream->StartCall();
}

void PushStream::Send(Message message, bool last) {
  const auto* event = std::get_if<v1::PrefillEvent>(&message);
  kind_under_way_ = event == nullptr        ? UnderWay::kFrame
                    : event->has_accepted() ? UnderWay::kOpen
                                            : UnderWay::kLast;
  under_way_ = EncodeReceiveRequest(std::move(message), call_.open);
  if (kind_under_way_ == UnderWay::kLast) result_is_sent_.store(true);
  if (last) {
    StartWriteLast(&under_way_, grpc::WriteOptions());
  } else {
    StartWrite(&under_way_);
  }
}

// Whoever gave receipts has said all there is to say. It need not end the call by itself. A call
// that is over has a status of its own, which a cancel might hide.
void PushStream::End(const absl::Status& status) {
  const bool has_ended = status.ok() && call_.method == Method::kReceive;
  if (!has_ended && !is_broken_.load()) context_.TryCancel();
  RemoveHold();
}

std::optional<Transport::ConnectionUse> PushStream::connection_use() const {
  const std::optional<int64_t> taken = sockets_.BytesTaken(context_.peer(), absl::Now());
  if (!taken.has_value()) return std::nullopt;
  return ConnectionUse{.bytes_taken = *taken, .most_streams = call_.open_streams()};
}

// The queue may send the next message from another thread at once, so the buffer is cleared first.
void PushStream::OnWriteDone(bool ok) {
  under_way_.Clear();
  const UnderWay kind = kind_under_way_;
  if (!ok) is_broken_.store(true);
  if (kind == UnderWay::kFrame) return queue_->OnWriteDone(ok);
  TakePart(kind == UnderWay::kOpen ? kOpenWritten : kLastWritten);
}

// Without this read a call that fails would go unnoticed until the next frame.
void PushStream::OnReadDone(bool ok) {
  if (ok && call_.method == Method::kReceive) {
    v1::ReceiveResponse response;
    // One that comes before the result says nothing.
    if (result_is_sent_.load() && wire::ParseMessage(response_, response).ok()) answer_ = response;
    return TakePart(kLastAnswered);
  }
  if (ok) {
    failure_ = TakeReceipt();
    response_.Clear();
    if (failure_.ok() && !is_complete_) return StartRead(&response_);
    if (failure_.ok()) return TakePart(kLastAnswered);
    context_.TryCancel();
  }
  NoteBroken();
  TakePart(kOpenAnswered | kLastAnswered);
}

absl::Status PushStream::TakeReceipt() {
  v1::ReceiveReceipt receipt;
  PREFILLD_RETURN_IF_ERROR(wire::ParseMessage(response_, receipt));
  if (receipt.damaged_size() > kMaxDamagedInReceipt) {
    return absl::InvalidArgumentError(absl::StrCat("a receipt with ", receipt.damaged_size(),
                                                   " damaged frames; at most ",
                                                   kMaxDamagedInReceipt));
  }
  const bool first = !has_receipt_;
  has_receipt_ = true;
  PREFILLD_RETURN_IF_ERROR(events_.on_receipt(receipt, first));
  is_complete_ = receipt.complete();
  if (first) TakePart(kOpenAnswered);
  return absl::OkStatus();
}

// Passes on that a message was taken, when the last of its parts is here.
void PushStream::TakePart(int part) {
  const int before = parts_.fetch_or(part);
  for (const int whole : {kOpenWritten | kOpenAnswered, kLastWritten | kLastAnswered}) {
    if ((before & whole) != whole && ((before | part) & whole) == whole) {
      queue_->OnWriteDone(!is_broken_.load());
    }
  }
}

void PushStream::NoteBroken() {
  is_broken_.store(true);
  if (!queue_->OnPeerGone(this)) queue_->Abort(Broken());
}

void PushStream::OnDone(const grpc::Status& status) {
  const absl::Status end = failure_.ok() ? wire::FromGrpc(status) : failure_;
  auto on_done = std::move(events_.on_done);
  const std::optional<v1::ReceiveResponse> answer = answer_;
  delete this;
  on_done(end, answer);
}

}  // namespace prefilld::server
