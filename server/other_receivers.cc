#include "server/other_receivers.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/prefill_job.h"

namespace prefilld::server {

OtherReceivers::Present OtherReceivers::present() const {
  absl::MutexLock lock(&mu_);
  return {jobs_, awaited_};
}

absl::Status OtherReceivers::Add(std::shared_ptr<PrefillJob> receiver) {
  const int number = receiver->work().receiver;
  if (number < 1 || number > places_) {
    return absl::InvalidArgumentError(
        absl::StrCat("receiver ", number, "; the request has ", places_, " beside its own call"));
  }
  absl::MutexLock lock(&mu_);
  const bool has_come = std::any_of(jobs_.begin(), jobs_.end(), [number](const auto& job) {
    return job->work().receiver == number;
  });
  if (has_come) {
    return absl::AlreadyExistsError(absl::StrCat("receiver ", number, " is attached already"));
  }
  if (!awaited_) {
    return absl::NotFoundError("request_id: the request awaits no more receivers");
  }
  jobs_.push_back(std::move(receiver));
  awaited_ = jobs_.size() < static_cast<size_t>(places_);
  return absl::OkStatus();
}

void OtherReceivers::Close() {
  absl::MutexLock lock(&mu_);
  awaited_ = false;
}

}  // namespace prefilld::server
