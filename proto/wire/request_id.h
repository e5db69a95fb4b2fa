// Names that callers choose for requests and transfers.
#ifndef PREFILLD_PROTO_WIRE_REQUEST_ID_H_
#define PREFILLD_PROTO_WIRE_REQUEST_ID_H_

#include <cstddef>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace prefilld::wire {

inline constexpr size_t kMaxIdBytes = 128;

// Checks an id. INVALID_ARGUMENT, with `field`, when it is longer than that or has characters other
// than printable ASCII. An empty id is valid.
absl::Status CheckId(absl::string_view field, absl::string_view id);

// These return the part of a text from outside that logs and messages show, because the text may be
// as long as a request. A valid id is shown whole.
absl::string_view ShownId(absl::string_view id);
absl::string_view ShownReason(absl::string_view reason);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_REQUEST_ID_H_
