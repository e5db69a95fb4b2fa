// Compares secrets.
#ifndef PREFILLD_PROTO_WIRE_SAME_KEY_H_
#define PREFILLD_PROTO_WIRE_SAME_KEY_H_

#include <cstddef>

#include "absl/strings/string_view.h"

namespace prefilld::wire {

// Compares a secret with what a caller shows. It takes the same time for all keys of one length, so
// that a key cannot be found digit by digit.
inline bool IsSameKey(absl::string_view shown, absl::string_view key) {
  if (shown.size() != key.size()) return false;
  int difference = 0;
  for (size_t i = 0; i < key.size(); ++i) difference |= shown[i] ^ key[i];
  return difference == 0;
}

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_SAME_KEY_H_
