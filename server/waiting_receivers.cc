#include "server/waiting_receivers.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/prefill_job.h"
#include "server/refusal_cause.h"
#include "server/resumable_jobs.h"
#include "server/scheduler.h"
#include "server/server_stream.h"

namespace prefilld::server {
namespace {

void End(PrefillJob& receiver, ServerStream* stream, Outcome outcome, const absl::Status& status) {
  receiver.Abort(outcome, status);
  receiver.delivery().control().Attach(stream);
}

}  // namespace

void WaitingReceivers::Bring(std::shared_ptr<PrefillJob> receiver, ServerStream* stream) {
  Waiting waiting{
      .receiver = std::move(receiver), .stream = stream, .until = clock_.Now() + kPatience};
  if (TryToJoin(waiting)) return;
  {
    absl::MutexLock lock(&mu_);
    if (HasRoomFor(*waiting.receiver)) {
      waiting_.push_back(std::move(waiting));
      return;
    }
  }
  End(*waiting.receiver, stream, Outcome::kQueueFull,
      Because(RefusalCause::kReceivers,
              absl::ResourceExhaustedError(absl::StrCat(
                  "receivers wait for their requests, ", kMaxWaiting, " or, of one tenant, ",
                  kMaxWaitingOfTenant, "; at most that many may"))));
}

bool WaitingReceivers::HasRoomFor(const PrefillJob& receiver) const {
  if (waiting_.size() >= kMaxWaiting) return false;
  const std::string& tenant = receiver.work().caller.tenant;
  if (tenant.empty()) return true;
  const auto of_tenant = [&tenant](const Waiting& waiting) {
    return waiting.receiver->work().caller.tenant == tenant;
  };
  return static_cast<size_t>(std::count_if(waiting_.begin(), waiting_.end(), of_tenant)) <
         kMaxWaitingOfTenant;
}

// Returns false if the receiver has to wait. An id that is free is that of a request before, whose
// caller is done with it.
bool WaitingReceivers::TryToJoin(const Waiting& waiting) {
  const std::shared_ptr<PrefillJob>& receiver = waiting.receiver;
  const std::shared_ptr<PrefillJob> owner = scheduler_.Find(receiver->work().id);
  if (owner == nullptr || owner->id_is_free()) {
    const std::string closed = scheduler_.closed();
    if (!closed.empty()) {
      End(*receiver, waiting.stream, Outcome::kUnavailable, absl::UnavailableError(closed));
      return true;
    }
    if (!receiver->ended() && clock_.Now() < waiting.until) return false;
    End(*receiver, waiting.stream, Outcome::kInvalid,
        absl::NotFoundError(absl::StrCat("request_id: no such request came within ",
                                         absl::FormatDuration(kPatience))));
    return true;
  }
  if (receiver->ended()) {  // it was cancelled, and must not take its number from the next call
    receiver->delivery().control().Attach(waiting.stream);
    return true;
  }
  if (const absl::Status joined = owner->Join(receiver); !joined.ok()) {
    End(*receiver, waiting.stream, Outcome::kInvalid, joined);
    return true;
  }
  scheduler_.Adopt(receiver);
  if (receiver->work().resumable()) resumable_.Add(receiver);
  AttachFirst(receiver->delivery().control(), waiting.stream);
  return true;
}

void WaitingReceivers::Retry() {
  std::vector<Waiting> still;
  for (Waiting& waiting : TakeAll()) {
    if (!TryToJoin(waiting)) still.push_back(std::move(waiting));
  }
  PutBack(std::move(still));
}

void WaitingReceivers::OnRefused(const std::string& request_id, const std::string& receiver_key,
                                 Outcome outcome, const absl::Status& status) {
  if (receiver_key.empty()) return;
  std::vector<Waiting> still;
  for (Waiting& waiting : TakeAll()) {
    const PrefillWork& wanted = waiting.receiver->work();
    if (wanted.id == request_id && IsSameKey(wanted.receiver_key, receiver_key)) {
      End(*waiting.receiver, waiting.stream, outcome, status);
    } else {
      still.push_back(std::move(waiting));
    }
  }
  PutBack(std::move(still));
}

std::vector<WaitingReceivers::Waiting> WaitingReceivers::TakeAll() {
  absl::MutexLock lock(&mu_);
  return std::exchange(waiting_, {});
}

void WaitingReceivers::PutBack(std::vector<Waiting> waiting) {
  absl::MutexLock lock(&mu_);
  waiting_.insert(waiting_.end(), std::make_move_iterator(waiting.begin()),
                  std::make_move_iterator(waiting.end()));
}

}  // namespace prefilld::server
