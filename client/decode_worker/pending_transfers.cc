#include "client/decode_worker/pending_transfers.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "proto/wire/keep_alive.h"
#include "proto/wire/lane_count.h"
#include "proto/wire/request_id.h"
#include "proto/wire/same_key.h"

namespace prefilld::client {

using ::prefill::v1::PrefillResult;
using ::prefill::v1::ReceiveOpen;

namespace {

constexpr absl::Duration kReportInterval = absl::Seconds(1);
// A sender knows after this time that its connection is dead.
constexpr absl::Duration kNoticedAfter =
    absl::Milliseconds(wire::kKeepAliveTimeMs + wire::kKeepAliveTimeoutMs);

}  // namespace

PendingTransfer::PendingTransfer(ExpectedTransfer expected, CacheWriter* writer,
                                 absl::Duration resume_window)
    : expected_(std::move(expected)), writer_(writer), resume_window_(resume_window) {}

absl::Status PendingTransfer::Open(const ReceiveOpen& open, const Stream& stream) {
  const uint32_t num_lanes = stream == nullptr ? 1 : open.num_lanes();
  if (num_lanes < 1 || num_lanes > wire::kMaxLanes) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_lanes ", num_lanes, "; from 1 to ", wire::kMaxLanes));
  }
  if (open.lane() >= num_lanes) {
    return absl::InvalidArgumentError(
        absl::StrCat("lane ", open.lane(), "; num_lanes is ", num_lanes));
  }
  Stream before;
  {
    absl::MutexLock lock(&mu_);
    PREFILLD_RETURN_IF_ERROR(status_);
    NoteSignOfLife();
    if (check_ == nullptr) {
      status_ = OpenFirst(open, /*resumable=*/stream != nullptr);
      PREFILLD_RETURN_IF_ERROR(status_);
      lanes_.resize(num_lanes);
    } else if (num_lanes != lanes_.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("num_lanes ", num_lanes, "; the transfer has ", lanes_.size()));
    } else if (open.layout().SerializeAsString() != layout_.SerializeAsString()) {
      return absl::InvalidArgumentError("layout: not the one of the transfer's first stream");
    }
    before = std::exchange(lanes_[open.lane()].stream, stream);
    lanes_[open.lane()].away_since.reset();
  }
  if (before != nullptr) before->Cancel();  // without the lock, because its hook may call Close
  return absl::OkStatus();
}

absl::Status PendingTransfer::OpenFirst(const ReceiveOpen& open, bool resumable) {
  PREFILLD_RETURN_IF_ERROR(CheckLayout(open.layout(), expected_));
  PREFILLD_RETURN_IF_ERROR(writer_->CheckShape(open.layout()));
  const uint32_t num_lanes = resumable ? open.num_lanes() : 1;
  check_ = std::make_unique<TransferCheck>(open.layout(), num_lanes, resumable);
  layout_ = open.layout();
  return absl::OkStatus();
}

absl::Status PendingTransfer::CheckStream(uint32_t lane, const Stream& stream) const {
  PREFILLD_RETURN_IF_ERROR(status_);
  if (lanes_[lane].stream == stream) return absl::OkStatus();
  return absl::AbortedError("another stream has taken this one's place");
}

absl::StatusOr<TransferCheck::Arrival> PendingTransfer::Write(uint32_t lane,
                                                              const wire::ReceivedFrame& frame,
                                                              const Stream& stream) {
  absl::Status stored;
  {
    absl::ReaderMutexLock lock(&mu_);
    PREFILLD_RETURN_IF_ERROR(CheckStream(lane, stream));
    if (result_) return absl::DataLossError("a frame came after the result");
    NoteSignOfLife();
    PREFILLD_ASSIGN_OR_RETURN(const TransferCheck::Arrival arrival, check_->Check(lane, frame));
    if (arrival == TransferCheck::Arrival::kNew) stored = writer_->Write(frame);
    if (stored.ok()) return arrival;
  }
  Fail(stored);
  return stored;
}

uint64_t PendingTransfer::received(uint32_t lane) const {
  absl::ReaderMutexLock lock(&mu_);
  return check_->received(lane);
}

absl::Status PendingTransfer::Complete(PrefillResult result, const Stream& stream) {
  absl::MutexLock lock(&mu_);
  PREFILLD_RETURN_IF_ERROR(CheckStream(/*lane=*/0, stream));
  if (result_) return absl::OkStatus();  // it comes again
  status_ = check_->Finish(result);
  if (status_.ok()) result_ = std::move(result);
  return status_;
}

bool PendingTransfer::is_complete() const {
  absl::ReaderMutexLock lock(&mu_);
  return result_.has_value();
}

void PendingTransfer::Close(uint32_t lane, const Stream& stream) {
  {
    absl::MutexLock lock(&mu_);
    if (!status_.ok() || lanes_[lane].stream != stream) return;
    lanes_[lane] = {.stream = nullptr, .away_since = absl::Now()};
  }
  if (resume_window_ <= absl::ZeroDuration()) {
    Fail(absl::UnavailableError("the pushed stream ended without a result"));
  }
}

bool PendingTransfer::EndWith(absl::Status reason) {
  absl::MutexLock lock(&mu_);
  if (!status_.ok() || result_) return false;
  status_ = std::move(reason);
  return true;
}

void PendingTransfer::Fail(absl::Status reason) { EndWith(std::move(reason)); }

void PendingTransfer::Abandon(absl::Status reason) {
  // Cancel is called without the lock, because its hooks call back into this object.
  if (EndWith(std::move(reason))) abandoned_.Cancel();
}

uint64_t PendingTransfer::frames() const {
  absl::ReaderMutexLock lock(&mu_);
  return check_ == nullptr ? 0 : check_->frames();
}

uint64_t PendingTransfer::bytes() const {
  absl::ReaderMutexLock lock(&mu_);
  return check_ == nullptr ? 0 : check_->bytes();
}

absl::Status PendingTransfer::CheckSender(absl::Time now, absl::Duration timeout) const {
  if (now - absl::FromUnixMicros(last_sign_of_life_us_) >= timeout) {
    return absl::DeadlineExceededError(
        absl::StrCat("nothing of the pushed cache came for ", absl::FormatDuration(timeout)));
  }
  const bool stays_away = std::any_of(lanes_.begin(), lanes_.end(), [&](const Lane& lane) {
    return lane.away_since.has_value() && now - *lane.away_since > resume_window_;
  });
  if (!stays_away) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the pushing server went away and did not come back ",
                                             "within ", absl::FormatDuration(resume_window_)));
}

absl::StatusOr<PrefillResult> PendingTransfer::Await(
    absl::Duration timeout, absl::FunctionRef<absl::Status()> while_waiting) {
  const auto ended = [this]()
                         ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !status_.ok() || result_; };
  while (true) {
    absl::Status sender;
    {
      absl::MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(absl::Condition(&ended), std::min(timeout, kReportInterval));
      PREFILLD_RETURN_IF_ERROR(status_);
      if (result_) return *result_;
      sender = CheckSender(absl::Now(), timeout);
    }
    absl::Status goes_on = while_waiting();
    if (goes_on.ok()) goes_on = std::move(sender);
    // If the transfer has ended meanwhile, Abandon changes nothing, and the next round sees the
    // end.
    if (!goes_on.ok()) Abandon(std::move(goes_on));
  }
}

absl::Status PendingTransfers::Register(const std::string& id,
                                        std::shared_ptr<PendingTransfer> transfer) {
  absl::MutexLock lock(&mu_);
  if (!entries_.try_emplace(id, Entry{std::move(transfer)}).second) {
    return absl::AlreadyExistsError(
        absl::StrCat("pushed_transfer_id '", id, "' is waited for by another request"));
  }
  return absl::OkStatus();
}

void PendingTransfers::Unregister(const std::string& id, absl::Duration resume_window) {
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(id);
  if (found == entries_.end()) return;
  const absl::Time now = absl::Now();
  while (!complete_.empty() &&
         (complete_.front().until < now || complete_.size() >= kMaxRemembered)) {
    complete_.pop_front();
  }
  Entry& entry = found->second;
  const bool has_lanes = entry.key.has_value() && !entry.key->empty();
  if (has_lanes && entry.transfer->is_complete() && resume_window > absl::ZeroDuration()) {
    complete_.push_back({id, std::move(entry), now + kNoticedAfter + resume_window});
  }
  entries_.erase(found);
}

absl::StatusOr<std::shared_ptr<PendingTransfer>> PendingTransfers::Claim(const std::string& id,
                                                                         const std::string& key) {
  absl::MutexLock lock(&mu_);
  // A transfer that is complete is known by its key where another one with its id is waited for.
  const auto waiting = entries_.find(id);
  Entry* entry = waiting == entries_.end() ? nullptr : &waiting->second;
  const absl::Time now = absl::Now();
  for (Remembered& complete : complete_) {
    if (complete.id != id || complete.until < now) continue;
    if (entry == nullptr || wire::IsSameKey(key, *complete.entry.key)) entry = &complete.entry;
  }
  const bool is_claimed = entry != nullptr && entry->key.has_value();
  // A cache that comes by Receive comes on one stream, and nothing else can bring it.
  if (entry == nullptr || (is_claimed && (key.empty() || entry->key->empty()))) {
    return absl::NotFoundError(
        absl::StrCat("nobody waits for transfer_id '", wire::ShownId(id), "'"));
  }
  if (is_claimed && !wire::IsSameKey(key, *entry->key)) {
    return absl::PermissionDeniedError("transfer_key: not the one of this transfer");
  }
  entry->key = key;
  return entry->transfer;
}

}  // namespace prefilld::client
