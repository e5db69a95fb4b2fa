#include "client/decode_worker/pushed_stream.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "client/decode_worker/spans.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/request_id.h"

namespace prefilld::client {

using ::prefill::v1::ReceiveOpen;
using ::prefill::v1::ReceiveRequest;

namespace {

constexpr size_t kMinKeyLength = 32;

absl::Status CheckKey(const std::string& key) {
  if (key.size() < kMinKeyLength) {
    return absl::InvalidArgumentError(
        absl::StrCat("transfer_key has ", key.size(), " characters; at least ", kMinKeyLength));
  }
  return wire::CheckId("transfer_key", key);
}

}  // namespace

PushedStream::PushedStream(const PushSurroundings& surroundings,
                           const grpc::CallbackServerContext& context, bool has_lanes)
    : stream_(*surroundings.arrivals, context.peer()),
      transfers_(surroundings.transfers),
      has_lanes_(has_lanes),
      peer_(context.peer()),
      trace_(TakeTrace(context, *surroundings.metrics)),
      late_hook_(late_.get(), [this, open_timeout = surroundings.open_timeout] {
        Answer(absl::DeadlineExceededError(
            absl::StrCat("no ReceiveOpen came within ", absl::FormatDuration(open_timeout))));
      }) {
  open_alarm_.Set(absl::ToChronoTime(absl::Now() + surroundings.open_timeout),
                  [late = late_](bool is_due) {
                    if (is_due) late->Cancel();
                  });
}

absl::Status PushedStream::Take(grpc::ByteBuffer& message) {
  PREFILLD_ASSIGN_OR_RETURN(auto frame, wire::ParseFrame(message));
  ReceiveRequest request;
  if (!frame.has_value()) {
    PREFILLD_RETURN_IF_ERROR(wire::ParseMessage(message, request));
    if (request.has_kv_frame()) frame = wire::MakeReceivedFrame(request.kv_frame());
  }
  if (frame.has_value()) {
    if (transfer_ == nullptr) return absl::DataLossError("a frame came before ReceiveOpen");
    return OnFrame(*frame);
  }
  if (request.has_open()) return TakeOpen(request.open());
  if (!request.has_result()) return absl::OkStatus();  // a message of a later version
  if (transfer_ == nullptr) return absl::DataLossError("the result came before ReceiveOpen");
  return OnResult(std::move(*request.mutable_result()));
}

absl::Status PushedStream::TakeOpen(const ReceiveOpen& open) {
  if (transfer_ != nullptr) return absl::DataLossError("ReceiveOpen came twice");
  if (has_lanes_) PREFILLD_RETURN_IF_ERROR(CheckKey(open.transfer_key()));
  const std::string key = has_lanes_ ? open.transfer_key() : "";
  PREFILLD_ASSIGN_OR_RETURN(transfer_, transfers_->Claim(open.transfer_id(), key));
  open_alarm_.Cancel();
  lane_ = open.lane();
  // The waiting request may end while the sender is silent between two layers.
  abandoned_hook_.emplace(&transfer_->abandoned(), [this] {
    Answer(absl::CancelledError("the request that waited for this cache has ended"));
  });
  return OnOpen(open);
}

void PushedStream::Answer(const absl::Status& status) {
  if (answered_.exchange(true)) return;
  Log(status);
  Reply(status);
}

void PushedStream::Log(const absl::Status& status) const {
  process::LogFields fields = {{"status", absl::StatusCodeToString(status.code())},
                               {"peer", peer_},
                               {"total_ms", absl::ToDoubleMilliseconds(absl::Now() - arrival_)}};
  if (has_lanes_) fields.emplace_back("lane", int64_t{lane_});
  AddSpan(trace_, arrival_, fields);
  if (!status.ok()) fields.emplace_back("reason", wire::ShownReason(status.message()));
  process::LogEvent(status.ok() ? process::LogLevel::kInfo : process::LogLevel::kWarning,
                    status.ok() ? "receive" : "receive_refused", fields);
}

}  // namespace prefilld::client
