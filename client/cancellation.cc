#include "client/cancellation.h"

#include <utility>

namespace prefilld::client {

void Cancellation::Cancel() {
  absl::MutexLock lock(&mu_);
  if (cancelled_) return;
  cancelled_ = true;
  for (auto& hook : hooks_) hook();
}

bool Cancellation::cancelled() const {
  absl::MutexLock lock(&mu_);
  return cancelled_;
}

CancelHook::CancelHook(Cancellation* cancellation, absl::AnyInvocable<void()> hook)
    : cancellation_(cancellation) {
  if (cancellation_ == nullptr) return;
  absl::MutexLock lock(&cancellation_->mu_);
  if (cancellation_->cancelled_) hook();
  position_ = cancellation_->hooks_.insert(cancellation_->hooks_.end(), std::move(hook));
}

CancelHook::~CancelHook() {
  if (cancellation_ == nullptr) return;
  absl::MutexLock lock(&cancellation_->mu_);
  cancellation_->hooks_.erase(position_);
}

}  // namespace prefilld::client
