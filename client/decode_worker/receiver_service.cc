#include "client/decode_worker/receiver_service.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "proto/status_macros.h"
#include "proto/wire/frame_codec.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::PrefillResult;
using ::prefill::v1::ReceiveOpen;
using ::prefill::v1::ReceiveReceipt;
using ::prefill::v1::ReceiveResponse;

constexpr size_t kMaxDamaged = 64;  // in one receipt

absl::Status EndedEarly() {
  return absl::UnavailableError("the pushed stream ended without a result");
}

// The whole cache on one stream, whose end is the transfer's. It deletes itself when gRPC is done
// with it.
class ReceiveCall : public grpc::ServerReadReactor<grpc::ByteBuffer>, private PushedStream {
 public:
  ReceiveCall(const PushSurroundings& surroundings, const grpc::CallbackServerContext& context,
              grpc::ByteBuffer* response)
      : PushedStream(surroundings, context, /*has_lanes=*/false), response_(response) {
    StartRead(&message_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End(Close());
    if (absl::Status taken = Take(message_); !taken.ok()) return End(std::move(taken));
    message_.Clear();
    StartRead(&message_);
  }

  void OnDone() override {
    // A transfer that is complete stays complete.
    if (transfer()) transfer()->Fail(absl::UnavailableError("the pushing server went away"));
    delete this;
  }

 private:
  absl::Status OnOpen(const ReceiveOpen& open) override { return transfer()->Open(open, nullptr); }

  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    if (result_) return absl::DataLossError("a frame came after the result");
    return transfer()->Write(/*lane=*/0, frame, nullptr).status();
  }

  absl::Status OnResult(PrefillResult result) override {
    if (result_) return absl::DataLossError("the result came twice");
    result_ = std::move(result);
    return absl::OkStatus();
  }

  // The sender has closed its side, or is gone. If no result came, either is a failure.
  absl::Status Close() {
    if (!transfer()) return absl::DataLossError("the stream ended before ReceiveOpen");
    if (!result_) return EndedEarly();
    return transfer()->Complete(*std::move(result_), nullptr);
  }

  // The transfer learns of the failure first, so that it keeps this reason.
  void End(absl::Status status) {
    if (!status.ok() && transfer()) transfer()->Fail(status);
    Answer(std::move(status));
  }

  void Reply(const absl::Status& status) override {
    if (status.ok()) {
      ReceiveResponse response;
      response.set_kv_bytes(transfer()->bytes());
      response.set_kv_frames(transfer()->frames());
      *response_ = wire::EncodeMessage(response);
    }
    Finish(wire::ToGrpc(status));
  }

  grpc::ByteBuffer* const response_;
  grpc::ByteBuffer message_;
  std::optional<PrefillResult> result_;
};

// One stream of a lane. Its end is not the transfer's. It deletes itself when gRPC is done with it.
//
// A receipt is written as soon as there is news and the one before is written.
class LaneCall : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                 private PushedStream {
 public:
  LaneCall(const PushSurroundings& surroundings, const grpc::CallbackServerContext& context)
      : PushedStream(surroundings, context, /*has_lanes=*/true),
        replaced_hook_(replaced_.get(), [this] {
          Answer(absl::AbortedError("another stream has taken this one's place"));
        }) {
    StartRead(&message_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End(is_open_ && transfer()->is_complete() ? absl::OkStatus() : EndedEarly());
    if (const absl::Status taken = Take(message_); !taken.ok()) return End(taken);
    message_.Clear();
    StartRead(&message_);
  }

  void OnWriteDone(bool) override {
    {
      absl::MutexLock lock(&mu_);
      is_busy_ = false;
    }
    Pump();
  }

  void OnDone() override {
    if (is_open_) transfer()->Close(lane(), replaced_);
    delete this;
  }

 private:
  absl::Status OnOpen(const ReceiveOpen& open) override {
    PREFILLD_RETURN_IF_ERROR(transfer()->Open(open, replaced_));
    is_open_ = true;
    Note();
    return absl::OkStatus();
  }

  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    PREFILLD_ASSIGN_OR_RETURN(const TransferCheck::Arrival arrival,
                              transfer()->Write(lane(), frame, replaced_));
    const bool is_damaged = arrival == TransferCheck::Arrival::kDamaged;
    Note(is_damaged ? std::optional<uint64_t>(frame.sequence) : std::nullopt);
    return absl::OkStatus();
  }

  absl::Status OnResult(PrefillResult result) override {
    if (lane() != 0) return absl::DataLossError("the result came on another lane than 0");
    PREFILLD_RETURN_IF_ERROR(transfer()->Complete(std::move(result), replaced_));
    Note();
    return absl::OkStatus();
  }

  void End(const absl::Status& status) {
    if (is_open_) transfer()->Close(lane(), replaced_);
    Answer(status);
  }

  // Has the sender told what is here, and that the frame is needed once more. On lane 0 the news
  // that all is here is the last.
  void Note(std::optional<uint64_t> damaged = std::nullopt) {
    const uint64_t received = transfer()->received(lane());
    const bool is_complete = lane() == 0 && transfer()->is_complete();
    {
      absl::MutexLock lock(&mu_);
      has_news_ = true;
      news_.set_received(received);
      news_.set_complete(is_complete);
      if (damaged.has_value()) damaged_.push_back(*damaged);
    }
    if (is_complete) return Answer(absl::OkStatus());
    Pump();
  }

  void Reply(const absl::Status& status) override {
    {
      absl::MutexLock lock(&mu_);
      end_ = status;
      if (!status.ok()) has_news_ = false;
    }
    Pump();
  }

  // Does what is next. gRPC is called without the lock, because it may call back at once, and never
  // again after Finish, which may be the end of this.
  void Pump() {
    std::optional<absl::Status> end;
    {
      absl::MutexLock lock(&mu_);
      if (is_busy_ || (!has_news_ && !end_.has_value())) return;
      is_busy_ = true;  // for ever with Finish
      if (has_news_) {
        TakeNews();
      } else {
        end = end_;
      }
    }
    if (end.has_value()) {
      Finish(wire::ToGrpc(*end));
    } else {
      StartWrite(&receipt_);
    }
  }

  void TakeNews() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const auto end = damaged_.begin() + std::min(damaged_.size(), kMaxDamaged);
    news_.mutable_damaged()->Assign(damaged_.begin(), end);
    damaged_.erase(damaged_.begin(), end);
    receipt_ = wire::EncodeMessage(news_);
    has_news_ = !damaged_.empty();
  }

  // Cancelled by the transfer when another stream takes this one's place.
  const std::shared_ptr<Cancellation> replaced_ = std::make_shared<Cancellation>();
  grpc::ByteBuffer message_;
  bool is_open_ = false;

  absl::Mutex mu_;
  ReceiveReceipt news_ ABSL_GUARDED_BY(mu_);
  std::vector<uint64_t> damaged_ ABSL_GUARDED_BY(mu_);
  bool has_news_ ABSL_GUARDED_BY(mu_) = false;
  bool is_busy_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mu_);
  grpc::ByteBuffer receipt_;  // belongs to gRPC from StartWrite to OnWriteDone

  const CancelHook replaced_hook_;
};

}  // namespace

grpc::ServerReadReactor<grpc::ByteBuffer>* ReceiverService::Receive(
    grpc::CallbackServerContext* context, grpc::ByteBuffer* response) {
  surroundings_.arrivals->NoteCall(context->peer());
  return new ReceiveCall(surroundings_, *context, response);
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* ReceiverService::ReceiveLane(
    grpc::CallbackServerContext* context) {
  surroundings_.arrivals->NoteCall(context->peer());
  return new LaneCall(surroundings_, *context);
}

}  // namespace prefilld::client
