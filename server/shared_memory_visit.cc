#include "server/shared_memory_visit.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "server/prefill_job.h"
#include "server/scheduler.h"
#include "server/shared_memory_metrics.h"
#include "server/shared_region.h"
#include "server/staging_ring.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;
using Visitor = SharedMemoryMetrics::Visitor;

// How often it is looked whether a request is over whose consumer stays.
constexpr absl::Duration kLookAround = absl::Milliseconds(200);

Visitor RefusalOf(const absl::Status& status) {
  if (absl::IsInvalidArgument(status)) return Visitor::kUnfit;
  return absl::IsResourceExhausted(status) ? Visitor::kNoMemory : Visitor::kRefused;
}

}  // namespace

void SharedMemoryVisit::Stop() {
  stops_ = true;
  socket_.Shutdown();
}

void SharedMemoryVisit::Run() {
  while (!stops_) {
    const std::optional<Attach> attach = NextAttach();
    if (!attach.has_value() || !ServeRequest(*attach)) break;
  }
  socket_.Shutdown();
}

// Passes over what the consumer said of the request before when it did not know yet that it was
// over. The time is that of all messages together.
std::optional<SharedMemoryVisit::Attach> SharedMemoryVisit::NextAttach() {
  if (next_.has_value()) return std::exchange(next_, std::nullopt);
  v1::SharedMemoryRequest request;
  const bool is_first = region_ == nullptr;
  const bool is_kept = !is_first && !surroundings_.use->is_half_taken();
  const absl::Time give_up = absl::Now() + (is_kept ? kIdle : kHandshake);
  absl::Status received;
  do {
    const absl::Duration left = std::max(give_up - absl::Now(), absl::ZeroDuration());
    received = socket_.Receive(request, left, &brought_);
  } while (received.ok() && !is_first && (request.has_receipt() || request.has_mapped()) &&
           absl::Now() < give_up);
  if (received.ok() && request.has_attach()) return std::move(*request.mutable_attach());
  if (is_first) surroundings_.metrics.Count(Visitor::kBrokenOff);
  return std::nullopt;
}

// Returns false when the connection is over.
bool SharedMemoryVisit::ServeRequest(const Attach& attach) {
  const bool is_first = region_ == nullptr;
  const absl::StatusOr<std::shared_ptr<PrefillJob>> admitted = Admit(attach);
  brought_.clear();
  const bool goes_on = Answer(attach, admitted.status());
  refused_.reset();
  if (!goes_on) return false;
  PrefillJob& job = **admitted;
  v1::SharedMemoryRequest request;
  if (!socket_.Receive(request, kHandshake).ok() || !request.has_mapped()) {
    surroundings_.metrics.Count(Visitor::kBrokenOff);
    return false;
  }
  // In this order no frame is sent that lies there before its lane keeps it.
  job.delivery().KeepUntilAcknowledged();
  job.credit()->set_is_read_in_place(true);
  surroundings_.ring.Lend(*job.credit(), region_);
  const SharedMemoryUse::Amount used = surroundings_.use->total();
  surroundings_.metrics.SetUse(used.bytes, used.attachments);
  surroundings_.metrics.Count(is_first ? Visitor::kAttached : Visitor::kAttachedAgain);
  const Reason reason = TakeMessages(job);
  // The memory of a consumer whose request has failed, because it took nothing for example, is not
  // kept for it.
  const bool has_failed = job.ended() && job.ending().outcome != Outcome::kOk;
  End(job, reason);
  return reason.ok() && (next_.has_value() || !has_failed);
}

// Finds the request and readies the memory for it. What is cheap to find out comes first.
absl::StatusOr<std::shared_ptr<PrefillJob>> SharedMemoryVisit::Admit(const Attach& attach) {
  std::shared_ptr<PrefillJob> job =
      surroundings_.scheduler.Find(attach.request_id(), attach.receiver());
  if (job == nullptr || job->work().shared_memory.key().empty()) {
    return absl::NotFoundError("request_id: no such running request with shared memory");
  }
  if (!IsSameKey(attach.key(), job->work().shared_memory.key())) {
    return absl::PermissionDeniedError("key: not the one of this request's Accepted");
  }
  is_known_ = true;
  refused_ = job;  // unless it is admitted
  // At once, so that no second consumer has memory mapped for the same request meanwhile.
  if (!job->ClaimSharedMemory()) {
    return absl::AlreadyExistsError("the request's shared memory was attached before");
  }
  const int tenant = job->work().tenant;
  absl::Status ready = region_ == nullptr ? BringMemory(attach, tenant) : ReuseMemory(tenant);
  if (ready.ok()) return job;
  job->UnclaimSharedMemory();
  return ready;
}

absl::Status SharedMemoryVisit::BringMemory(const Attach& attach, int tenant) {
  if (brought_.size() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        brought_.empty() ? "no descriptor came" : "several descriptors came", " with attach; one"));
  }
  const auto least = static_cast<int64_t>(surroundings_.buffer_bytes);
  if (attach.bytes() < static_cast<uint64_t>(least) ||
      attach.bytes() > static_cast<uint64_t>(surroundings_.most_bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("bytes ", attach.bytes(), "; from ", least,
                                                   ", a frame, to ", surroundings_.most_bytes));
  }
  PREFILLD_ASSIGN_OR_RETURN(
      SharedMemoryUse::Share share,
      SharedMemoryUse::Take(surroundings_.use, tenant, static_cast<int64_t>(attach.bytes())));
  PREFILLD_ASSIGN_OR_RETURN(region_, SharedRegion::Map(surroundings_.engine, std::move(share),
                                                       std::move(brought_.front()), attach.bytes(),
                                                       surroundings_.buffer_bytes));
  return absl::OkStatus();
}

// Frames of the request before may still lie there, if the consumer left it early. They go first.
absl::Status SharedMemoryVisit::ReuseMemory(int tenant) {
  if (!brought_.empty()) {
    return absl::InvalidArgumentError("a descriptor came; this connection has its memory");
  }
  if (!surroundings_.ring.AwaitBack(*region_, kHandshake)) {
    return absl::AbortedError("frames of the request before lie in the memory");
  }
  return region_->ChargeTo(tenant);
}

// Tells the consumer how its `attach` went, and returns whether it may go on. Attempts without a
// key are only counted, and so are those of a request after its first, because they could fill the
// log.
bool SharedMemoryVisit::Answer(const Attach& attach, const absl::Status& status) {
  if (!status.ok()) {
    surroundings_.metrics.Count(RefusalOf(status));
    if (refused_ != nullptr && refused_->NoteSharedMemoryRefused()) {
      process::LogEvent(process::LogLevel::kWarning, "shared_memory_refused",
                        {{"id", attach.request_id()},
                         {"receiver", int64_t{attach.receiver()}},
                         {"reason", std::string(status.message())}});
    }
  }
  v1::SharedMemoryAttached answer;
  answer.set_code(static_cast<int>(status.code()));
  answer.set_message(std::string(status.message()));
  if (status.ok()) answer.set_bytes(region_->bytes());
  const bool is_sent = socket_.Send(answer, kHandshake).ok();
  if (status.ok() && !is_sent) surroundings_.metrics.Count(Visitor::kBrokenOff);
  return status.ok() && is_sent;
}

SharedMemoryVisit::Reason SharedMemoryVisit::TakeMessages(PrefillJob& job) {
  v1::SharedMemoryRequest request;
  while (!stops_ && !job.ended()) {
    const absl::Status received = socket_.Receive(request, kLookAround, &brought_);
    if (absl::IsDeadlineExceeded(received)) continue;
    if (absl::IsUnavailable(received)) {
      return absl::CancelledError("the consumer has closed the connection of its shared memory");
    }
    PREFILLD_RETURN_IF_ERROR(received);
    switch (request.request_case()) {
      case v1::SharedMemoryRequest::kReceipt:
        PREFILLD_RETURN_IF_ERROR(TakeReceipt(request.receipt(), job));
        break;
      case v1::SharedMemoryRequest::kMapped:
        job.credit()->set_is_read_in_place(true);
        break;
      case v1::SharedMemoryRequest::kAttach:
        next_ = std::move(*request.mutable_attach());
        return absl::OkStatus();
      default:
        return absl::InvalidArgumentError("a message is none of attach, mapped and receipt");
    }
  }
  return absl::OkStatus();
}

SharedMemoryVisit::Reason SharedMemoryVisit::TakeReceipt(const v1::SharedMemoryReceipt& message,
                                                         PrefillJob& job) {
  v1::LaneReceipt receipt;
  receipt.set_lane(message.lane());
  receipt.set_received(message.received());
  const auto taken = job.delivery().Acknowledge(receipt);
  if (taken.ok() || job.ended()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("lane ", receipt.lane(), ": ", taken.status().message()));
}

// Receipts come before the end of the connection, so a consumer that has every frame is known to
// have them then, however soon it goes.
void SharedMemoryVisit::End(PrefillJob& job, const Reason& reason) {
  job.credit()->set_is_read_in_place(false);
  surroundings_.ring.TakeBack(*job.credit());
  if (job.ended() || stops_) return;
  if (absl::IsInvalidArgument(reason)) {
    job.Abort(Outcome::kInvalid,
              absl::InvalidArgumentError(absl::StrCat("shared memory: ", reason.message())));
    return;
  }
  if (job.delivery().HasDelivered(job.work().kv_bytes()) || job.work().resumable()) return;
  job.OnCallCancelled();
}

}  // namespace prefilld::server
