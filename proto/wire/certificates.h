// Checks of what PEM files hold, before a connection depends on it.
#ifndef PREFILLD_PROTO_WIRE_CERTIFICATES_H_
#define PREFILLD_PROTO_WIRE_CERTIFICATES_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prefilld::wire {

// Certificates and a key as PEM. `name` is how an error calls a file: its flag and path.
struct PemText {
  std::string name;
  std::string text;
};

// Checks a certificate chain, the holder's own certificate first, and its private key, which must
// have no password. Returns when the first certificate of the chain expires. INVALID_ARGUMENT: one
// cannot be parsed, has expired or is not valid yet, or the key belongs to another certificate.
absl::StatusOr<absl::Time> CheckKeyPair(const PemText& chain, const PemText& key, absl::Time now);

// Checks certificates that sign others. INVALID_ARGUMENT: there is none, one cannot be parsed, or
// all have expired. Bundles live long, so some of many may have.
absl::Status CheckAuthorities(const PemText& authorities, absl::Time now);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_CERTIFICATES_H_
