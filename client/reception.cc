#include "client/reception.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::client {

using ::prefill::v1::Accepted;
using ::prefill::v1::AttachReceiverRequest;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;

namespace {

// A stream that is resumed begins with what was accepted.
absl::Status CheckAcceptedAgain(const Accepted& again, const Accepted& before) {
  if (again.request_id() == before.request_id() &&
      again.layout().SerializeAsString() == before.layout().SerializeAsString()) {
    return absl::OkStatus();
  }
  return absl::DataLossError("a resumed stream is that of another request");
}

}  // namespace

Reception::Reception(const PrefillRequest& request, KvSink& sink, uint32_t max_lanes)
    : sink_(sink),
      expected_{request.layout(), static_cast<uint32_t>(request.token_ids_size()),
                request.model_fingerprint()},
      max_lanes_(max_lanes),
      delivered_elsewhere_(request.has_deliver_to() || request.pushes_size() > 0),
      wants_logprobs_(request.prompt_logprobs()) {}

Reception::Reception(const AttachReceiverRequest& request, KvSink& sink, uint32_t max_lanes)
    : sink_(sink),
      expected_{request.layout(), request.num_tokens(), request.model_fingerprint()},
      max_lanes_(max_lanes) {}

absl::Status Reception::Take(uint32_t lane, grpc::ByteBuffer& message) {
  PREFILLD_ASSIGN_OR_RETURN(auto frame, wire::ParseFrame(message));
  if (frame.has_value()) return TakeFrame(lane, *std::move(frame));
  PrefillEvent event;
  PREFILLD_RETURN_IF_ERROR(wire::ParseMessage(message, event));
  if (event.has_kv_frame()) return TakeFrame(lane, wire::MakeReceivedFrame(event.kv_frame()));
  if (lane != 0) {
    return absl::DataLossError(absl::StrCat("lane ", lane, " carries more than frames"));
  }
  return TakeEvent(std::move(event));
}

// The server is told at once that frames may lie in the memory, so it must be known here first.
void Reception::AttachSharedMemory(SharedMemoryPool& pool) {
  auto attached = pool.Attach(*accepted_);
  absl::Status status = attached.status();
  if (status.ok()) {
    attached_ = *std::move(attached);
    shared_memory_ = attached_.get();
    status = attached_->Begin();
  }
  if (!status.ok()) shared_memory_ = nullptr;
  sink_.OnSharedMemory(status);
}

// If the server does not hear it, payloads come over gRPC.
void Reception::UseSharedMemoryAgain() {
  SharedMemory* const memory = shared_memory_;
  if (memory != nullptr) memory->Begin().IgnoreError();
}

absl::Status Reception::TakeFrame(uint32_t lane, wire::ReceivedFrame frame) {
  if (check_ == nullptr) return absl::DataLossError("a frame came before Accepted");
  if (delivered_elsewhere_) {
    return absl::DataLossError("a frame came here though the cache is delivered elsewhere");
  }
  if (frame.shared_bytes > 0) {
    const SharedMemory* const memory = shared_memory_;
    if (memory == nullptr) {
      return absl::DataLossError("a frame lies in shared memory that is not attached");
    }
    PREFILLD_ASSIGN_OR_RETURN(frame.payload, memory->PayloadOf(frame));
  }
  PREFILLD_ASSIGN_OR_RETURN(const TransferCheck::Arrival arrival, check_->Check(lane, frame));
  if (arrival == TransferCheck::Arrival::kDamaged) {
    acknowledger_->Note(lane, check_->received(lane), frame.sequence);
    return absl::OkStatus();
  }
  if (arrival == TransferCheck::Arrival::kAgain) return absl::OkStatus();
  PREFILLD_RETURN_IF_ERROR(BySink(sink_.OnFrame(frame)));
  progress_.fetch_add(1, std::memory_order_relaxed);
  Acknowledge(lane);
  return absl::OkStatus();
}

// The socket of the shared memory is the shorter way. A resumable request has the other one as
// well, for a server that does not hear this one.
void Reception::Acknowledge(uint32_t lane) {
  const uint64_t received = check_->received(lane);
  SharedMemory* const memory = shared_memory_;
  if (memory != nullptr && memory->Acknowledge(lane, received)) return;
  if (acknowledger_ != nullptr) acknowledger_->Note(lane, received);
}

absl::Status Reception::BySink(absl::Status status) {
  if (!status.ok()) refused_by_sink_.store(true, std::memory_order_release);
  return status;
}

absl::Status Reception::TakeEvent(PrefillEvent event) {
  if (acknowledger_ != nullptr && accepted_.has_value() && event.has_accepted()) {
    return CheckAcceptedAgain(event.accepted(), *accepted_);
  }
  if (event.has_accepted() == accepted_.has_value()) {
    return absl::DataLossError(accepted_.has_value() ? "Accepted came twice"
                                                     : "the stream does not begin with Accepted");
  }
  const bool is_result_again = acknowledger_ != nullptr && event.has_result();
  if (result_ && !is_result_again) return absl::DataLossError("an event came after the result");
  progress_.fetch_add(1, std::memory_order_relaxed);
  switch (event.event_case()) {
    case PrefillEvent::kAccepted:
      return TakeAccepted(event.accepted());
    case PrefillEvent::kProgress:
      return BySink(sink_.OnProgress(event.progress()));
    case PrefillEvent::kResult:
      result_ = std::move(*event.mutable_result());
      has_result_.store(true, std::memory_order_release);
      return absl::OkStatus();
    default:
      return absl::OkStatus();  // an event of a later version
  }
}

absl::Status Reception::TakeAccepted(const Accepted& accepted) {
  PREFILLD_RETURN_IF_ERROR(CheckLayout(accepted.layout(), expected_));
  const uint32_t num_lanes = accepted.num_lanes();
  if (num_lanes < 1 || num_lanes > max_lanes_) {
    return absl::FailedPreconditionError(
        absl::StrCat("num_lanes is ", num_lanes, ", asked for were ", max_lanes_));
  }
  if (accepted.resume_window_ms() == 0) acknowledger_ = nullptr;
  check_ = std::make_unique<TransferCheck>(accepted.layout(), num_lanes,
                                           /*resumable=*/acknowledger_ != nullptr);
  accepted_ = accepted;
  return BySink(sink_.OnAccepted(accepted));
}

absl::StatusOr<PrefillResult> Reception::Finish() {
  if (!result_) return absl::DataLossError("the stream ended without a result");
  if (!delivered_elsewhere_) PREFILLD_RETURN_IF_ERROR(check_->Finish(*result_));
  PREFILLD_RETURN_IF_ERROR(CheckLogprobs());
  return *std::move(result_);
}

// The result must have as many log-probabilities as were asked for, wherever the cache went.
absl::Status Reception::CheckLogprobs() const {
  const int due = wants_logprobs_ ? static_cast<int>(expected_.num_tokens) - 1 : 0;
  for (const auto& [field, values] : {std::pair("prompt_logprobs", &result_->prompt_logprobs()),
                                      std::pair("best_logprobs", &result_->best_logprobs())}) {
    if (values->size() == due) continue;
    return absl::DataLossError(
        absl::StrCat(values->size(), " ", field, " arrived; ", due, " are due"));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::client
