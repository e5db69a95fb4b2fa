// Names that callers choose for requests and transfers.
#ifndef PREFILLD_PROTO_WIRE_REQUEST_ID_H_
#define PREFILLD_PROTO_WIRE_REQUEST_ID_H_

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace prefilld::wire {

inline constexpr size_t kMaxIdBytes = 128;

// Checks an id. INVALID_ARGUMENT, with `field`, when it is longer than that or has characters other
// than printable ASCII. An empty id is valid.
absl::Status CheckId(absl::string_view field, absl::string_view id);

// These return what logs and messages show of a text from outside, which may be as long as a
// request: its beginning and, if that is not all, how many bytes follow. A valid id is shown whole.
std::string ShownId(absl::string_view id);
std::string ShownReason(absl::string_view reason);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_REQUEST_ID_H_
