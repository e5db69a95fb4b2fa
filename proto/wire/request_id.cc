#include "proto/wire/request_id.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace prefilld::wire {
namespace {

constexpr size_t kMaxShownId = kMaxIdBytes;
constexpr size_t kMaxShownReason = 300;

std::string Shown(absl::string_view text, size_t most) {
  if (text.size() <= most) return std::string(text);
  return absl::StrCat(text.substr(0, most), "... (", text.size() - most, " bytes more)");
}

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

std::string ShownId(absl::string_view id) { return Shown(id, kMaxShownId); }

std::string ShownReason(absl::string_view reason) { return Shown(reason, kMaxShownReason); }

}  // namespace prefilld::wire
