#include "server/shared_memory_use.h"

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::server {

absl::StatusOr<SharedMemoryUse::Share> SharedMemoryUse::Take(
    const std::shared_ptr<SharedMemoryUse>& use, int tenant, int64_t bytes) {
  absl::MutexLock lock(&use->mu_);
  const Limits& limits = use->limits_;
  const Amount then = {use->total_.bytes + bytes, use->total_.attachments + 1};
  if (then.bytes > limits.bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("bytes ", bytes, ": of ", limits.bytes,
                                                     " for all consumers ", use->total_.bytes,
                                                     " are taken"));
  }
  if (then.attachments > limits.attachments) {
    return absl::ResourceExhaustedError(
        absl::StrCat("all ", limits.attachments, " memories that may be attached are"));
  }
  PREFILLD_RETURN_IF_ERROR(use->CheckTenant(tenant, bytes, then));
  use->Add(tenant, bytes, 1);
  Share share;
  share.use_ = use;
  share.tenant_ = tenant;
  share.bytes_ = bytes;
  return share;
}

absl::Status SharedMemoryUse::CheckTenant(int tenant, int64_t bytes,
                                          const Amount& total_then) const {
  if (!limits_.is_shared_by_tenants) return absl::OkStatus();
  const auto found = of_tenants_.find(tenant);
  const Amount has = found == of_tenants_.end() ? Amount() : found->second;
  if (has.bytes + bytes <= limits_.bytes - total_then.bytes &&
      has.attachments + 1 <= limits_.attachments - total_then.attachments) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(absl::StrCat("bytes ", bytes, ": the tenant has ", has.bytes,
                                                   " in ", has.attachments,
                                                   " memories, and what is left of ", limits_.bytes,
                                                   " in ", limits_.attachments, " is for others"));
}

bool SharedMemoryUse::is_half_taken() const {
  absl::MutexLock lock(&mu_);
  return 2 * total_.attachments > limits_.attachments;
}

void SharedMemoryUse::Add(int tenant, int64_t bytes, int64_t attachments) {
  Amount& held = of_tenants_[tenant];
  held.bytes += bytes;
  held.attachments += attachments;
  if (held.attachments == 0) of_tenants_.erase(tenant);
  total_.bytes += bytes;
  total_.attachments += attachments;
}

SharedMemoryUse::Amount SharedMemoryUse::total() const {
  absl::MutexLock lock(&mu_);
  return total_;
}

SharedMemoryUse::Share::~Share() {
  if (use_ == nullptr) return;
  absl::MutexLock lock(&use_->mu_);
  use_->Add(tenant_, -bytes_, -1);
}

absl::Status SharedMemoryUse::Share::MoveTo(int tenant) {
  if (tenant == tenant_) return absl::OkStatus();
  absl::MutexLock lock(&use_->mu_);
  PREFILLD_RETURN_IF_ERROR(use_->CheckTenant(tenant, bytes_, use_->total_));
  use_->Add(tenant_, -bytes_, -1);
  use_->Add(tenant, bytes_, 1);
  tenant_ = tenant;
  return absl::OkStatus();
}

}  // namespace prefilld::server
