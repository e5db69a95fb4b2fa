#include "client/decode_worker/receiver_service.h"

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cancellation.h"
#include "client/decode_worker/spans.h"
#include "grpcpp/alarm.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/frame_codec.h"
#include "proto/wire/grpc_status.h"
#include "proto/wire/request_id.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::PrefillResult;
using ::prefill::v1::ReceiveOpen;
using ::prefill::v1::ReceiveRequest;
using ::prefill::v1::ReceiveResponse;

// One pushed stream. It deletes itself when gRPC is done with it.
class ReceiveCall : public grpc::ServerReadReactor<grpc::ByteBuffer> {
 public:
  ReceiveCall(PendingTransfers* transfers, absl::Duration open_timeout, std::string peer,
              wire::TraceContext trace, wire::Arrivals& arrivals, grpc::ByteBuffer* response)
      : stream_(arrivals, peer),
        transfers_(transfers),
        response_(response),
        peer_(std::move(peer)),
        trace_(std::move(trace)),
        late_hook_(late_.get(), [this, open_timeout] {
          Answer(absl::DeadlineExceededError(
              absl::StrCat("no ReceiveOpen came within ", absl::FormatDuration(open_timeout))));
        }) {
    open_alarm_.Set(absl::ToChronoTime(absl::Now() + open_timeout), [late = late_](bool is_due) {
      if (is_due) late->Cancel();
    });
    StartRead(&message_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End(Close());
    if (absl::Status taken = Take(); !taken.ok()) return End(std::move(taken));
    message_.Clear();
    StartRead(&message_);
  }

  void OnDone() override {
    // A transfer that is complete stays complete.
    if (transfer_) transfer_->Fail(absl::UnavailableError("the pushing server went away"));
    delete this;
  }

 private:
  absl::Status Take() {
    PREFILLD_ASSIGN_OR_RETURN(const auto frame, wire::ParseFrame(message_));
    if (frame.has_value()) return TakeFrame(*frame);
    ReceiveRequest request;
    PREFILLD_RETURN_IF_ERROR(wire::ParseMessage(message_, request));
    switch (request.message_case()) {
      case ReceiveRequest::kOpen:
        return TakeOpen(request.open());
      case ReceiveRequest::kKvFrame:
        return TakeFrame(wire::MakeReceivedFrame(request.kv_frame()));
      case ReceiveRequest::kResult:
        if (result_) return absl::DataLossError("the result came twice");
        result_ = std::move(*request.mutable_result());
        return absl::OkStatus();
      default:
        return absl::OkStatus();  // a message of a later version
    }
  }

  absl::Status TakeOpen(const ReceiveOpen& open) {
    if (transfer_) return absl::DataLossError("ReceiveOpen came twice");
    PREFILLD_ASSIGN_OR_RETURN(transfer_, transfers_->Claim(open.transfer_id()));
    open_alarm_.Cancel();
    // The waiting request may end while the sender is silent between two layers.
    abandoned_hook_.emplace(&transfer_->abandoned(), [this] {
      Answer(absl::CancelledError("the request that waited for this cache has ended"));
    });
    return transfer_->Open(open.layout());
  }

  absl::Status TakeFrame(const wire::ReceivedFrame& frame) {
    if (!transfer_) return absl::DataLossError("a frame came before ReceiveOpen");
    if (result_) return absl::DataLossError("a frame came after the result");
    return transfer_->Write(frame);
  }

  // The sender has closed its side, or is gone. If no result came, either is a failure.
  absl::Status Close() {
    if (!transfer_) return absl::DataLossError("the stream ended before ReceiveOpen");
    if (!result_) return absl::UnavailableError("the pushed stream ended without a result");
    return transfer_->Complete(*std::move(result_));
  }

  // The transfer learns of the failure first, so that it keeps this reason.
  void End(absl::Status status) {
    if (!status.ok() && transfer_) transfer_->Fail(status);
    Answer(std::move(status));
  }

  void Answer(const absl::Status& status) {
    if (answered_.exchange(true)) return;
    Log(status);
    if (status.ok()) {
      ReceiveResponse response;
      response.set_kv_bytes(transfer_->bytes());
      response.set_kv_frames(transfer_->frames());
      const grpc::Slice bytes(response.SerializeAsString());
      *response_ = grpc::ByteBuffer(&bytes, 1);
    }
    Finish(wire::ToGrpc(status));
  }

  void Log(const absl::Status& status) const {
    process::LogFields fields = {{"status", absl::StatusCodeToString(status.code())},
                                 {"peer", peer_},
                                 {"total_ms", absl::ToDoubleMilliseconds(absl::Now() - arrival_)}};
    AddSpan(trace_, arrival_, fields);
    if (!status.ok()) fields.emplace_back("reason", wire::ShownReason(status.message()));
    process::LogEvent(status.ok() ? process::LogLevel::kInfo : process::LogLevel::kWarning,
                      status.ok() ? "receive" : "receive_refused", fields);
  }

  const wire::Arrivals::Stream stream_;
  PendingTransfers* const transfers_;
  grpc::ByteBuffer* const response_;
  const std::string peer_;
  const wire::TraceContext trace_;
  const absl::Time arrival_ = absl::Now();
  grpc::ByteBuffer message_;
  std::shared_ptr<PendingTransfer> transfer_;
  std::optional<PrefillResult> result_;
  std::atomic<bool> answered_ = false;
  std::optional<CancelHook> abandoned_hook_;

  // The alarm owns this too, because it may go off while this call is destroyed.
  const std::shared_ptr<Cancellation> late_ = std::make_shared<Cancellation>();
  const CancelHook late_hook_;
  grpc::Alarm open_alarm_;
};

}  // namespace

grpc::ServerReadReactor<grpc::ByteBuffer>* ReceiverService::Receive(
    grpc::CallbackServerContext* context, grpc::ByteBuffer* response) {
  arrivals_->NoteCall(context->peer());
  return new ReceiveCall(transfers_, open_timeout_, context->peer(), TakeTrace(*context, *metrics_),
                         *arrivals_, response);
}

}  // namespace prefilld::client
