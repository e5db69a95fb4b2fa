#include "proto/wire/request_id.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace prefilld::wire {
namespace {

constexpr size_t kMaxShownId = kMaxIdBytes + 22;
constexpr size_t kMaxShownReason = 300;

}  // namespace

absl::Status CheckId(absl::string_view field, absl::string_view id) {
  const bool printable = std::all_of(id.begin(), id.end(), [](char c) {
    return absl::ascii_isprint(static_cast<unsigned char>(c));
  });
  if (printable && id.size() <= kMaxIdBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " of ", id.size(),
                                                 " bytes, allowed: at most ", kMaxIdBytes,
                                                 " printable ASCII characters"));
}

absl::string_view ShownId(absl::string_view id) { return id.substr(0, kMaxShownId); }

absl::string_view ShownReason(absl::string_view reason) {
  return reason.substr(0, kMaxShownReason);
}

}  // namespace prefilld::wire
