#include "client/decode_worker/pending_transfers.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "proto/wire/request_id.h"

namespace prefilld::client {

using ::prefill::v1::KvLayout;
using ::prefill::v1::PrefillResult;

namespace {

constexpr absl::Duration kReportInterval = absl::Seconds(1);

}  // namespace

PendingTransfer::PendingTransfer(ExpectedTransfer expected, CacheWriter* writer)
    : expected_(std::move(expected)), writer_(writer) {}

absl::Status PendingTransfer::Open(const KvLayout& layout) {
  absl::MutexLock lock(&mu_);
  PREFILLD_RETURN_IF_ERROR(status_);
  last_sign_of_life_ = absl::Now();
  status_ = CheckLayout(layout, expected_);
  status_.Update(writer_->CheckShape(layout));
  PREFILLD_RETURN_IF_ERROR(status_);
  check_ = std::make_unique<TransferCheck>(layout, /*num_lanes=*/1);
  return absl::OkStatus();
}

// The lock is held during the write, so that Abandon knows when the writer is at rest.
absl::Status PendingTransfer::Write(const wire::ReceivedFrame& frame) {
  absl::MutexLock lock(&mu_);
  PREFILLD_RETURN_IF_ERROR(status_);
  last_sign_of_life_ = absl::Now();
  status_ = check_->Check(/*lane=*/0, frame).status();
  if (status_.ok()) status_ = writer_->Write(frame);
  return status_;
}

absl::Status PendingTransfer::Complete(PrefillResult result) {
  absl::MutexLock lock(&mu_);
  PREFILLD_RETURN_IF_ERROR(status_);
  status_ = check_->Finish(result);
  if (status_.ok()) result_ = std::move(result);
  return status_;
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
  absl::MutexLock lock(&mu_);
  return check_ == nullptr ? 0 : check_->frames();
}

uint64_t PendingTransfer::bytes() const {
  absl::MutexLock lock(&mu_);
  return check_ == nullptr ? 0 : check_->bytes();
}

absl::StatusOr<PrefillResult> PendingTransfer::Await(
    absl::Duration timeout, absl::FunctionRef<absl::Status()> while_waiting) {
  const auto ended = [this]()
                         ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !status_.ok() || result_; };
  while (true) {
    absl::Duration silence;
    {
      absl::MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(absl::Condition(&ended), std::min(timeout, kReportInterval));
      PREFILLD_RETURN_IF_ERROR(status_);
      if (result_) return *std::move(result_);
      silence = absl::Now() - last_sign_of_life_;
    }
    absl::Status goes_on = while_waiting();
    if (goes_on.ok() && silence >= timeout) {
      goes_on = absl::DeadlineExceededError(
          absl::StrCat("nothing of the pushed cache came for ", absl::FormatDuration(timeout)));
    }
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

void PendingTransfers::Unregister(const std::string& id) {
  absl::MutexLock lock(&mu_);
  entries_.erase(id);
}

absl::StatusOr<std::shared_ptr<PendingTransfer>> PendingTransfers::Claim(const std::string& id) {
  absl::MutexLock lock(&mu_);
  const auto entry = entries_.find(id);
  if (entry == entries_.end() || entry->second.claimed) {
    return absl::NotFoundError(
        absl::StrCat("nobody waits for transfer_id '", wire::ShownId(id), "'"));
  }
  entry->second.claimed = true;
  return entry->second.transfer;
}

}  // namespace prefilld::client
