// Patterns of the addresses that an operator lets requests name.
#ifndef PREFILLD_PROTO_WIRE_ADDRESS_PATTERN_H_
#define PREFILLD_PROTO_WIRE_ADDRESS_PATTERN_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace prefilld::wire {

// Four kinds of patterns, each for addresses of its own kind alone. '*' as a port is any port.
//
//   10.2.*.*:50052     IPv4 addresses. Four labels, numbers or '*'.
//   [fd00:1::*]:50052  IPv6 addresses, however they are written. '*' is any group of 16 bits.
//   *.pods:50052       Names, in any case. '*' is any run of characters within a label. The last
//                      of several labels may not have one: it would admit anybody's domain.
//   unix:/run/*.sock   Unix sockets. '*' is any run of characters without a slash.
//
// A pattern of addresses never admits a name, not even one such as 10.2.evil.example, and not one
// that resolves to an address it admits: names resolve to what their owners say.

// Returns why `pattern` is none of these, for an operator; nullopt if it is one.
std::optional<std::string> AddressPatternProblem(absl::string_view pattern);

// Tells whether `address`, host:port or unix:/path, is valid and `pattern` admits it.
bool AddressMatches(absl::string_view pattern, absl::string_view address);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_ADDRESS_PATTERN_H_
