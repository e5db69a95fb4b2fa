#include "client/memory_budget.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace prefilld::client {

absl::StatusOr<MemoryBudget::Share> MemoryBudget::Take(size_t bytes) {
  size_t left = left_;
  while (bytes <= left) {
    if (left_.compare_exchange_weak(left, left - bytes)) return Share(this, bytes);
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "of the ", bytes_, " bytes that this process makes for servers too few are left"));
}

}  // namespace prefilld::client
