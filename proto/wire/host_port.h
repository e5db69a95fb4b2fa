// Network addresses as operators and requests write them: the form of DeliverTo.address and of
// every flag that takes host:port.
#ifndef PREFILLD_PROTO_WIRE_HOST_PORT_H_
#define PREFILLD_PROTO_WIRE_HOST_PORT_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace prefilld::wire {

struct HostPort {
  std::string host;  // a name, an IPv4 address, or an IPv6 address without its brackets
  int port = 0;      // 0 to 65535
};

// Parses "name:port", "1.2.3.4:port" or "[::1]:port", and nothing else (no schemes, no paths).
std::optional<HostPort> ParseHostPort(absl::string_view text);

// Returns `<setting>=<text> is not host:port ...` for an address that is not valid, otherwise
// nullopt. A server may listen on port 0, which stands for any free port; nobody can dial it.
std::optional<std::string> ListenAddressProblem(absl::string_view setting, absl::string_view text);
std::optional<std::string> DialAddressProblem(absl::string_view setting, absl::string_view text);

// Tells whether `address` is host:port and `pattern` admits it. '*' in the pattern stands for any
// run of characters within one label: it crosses neither a dot nor a colon.
bool AddressMatches(absl::string_view pattern, absl::string_view address);
// Tells whether any address can match.
bool IsAddressPattern(absl::string_view pattern);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_HOST_PORT_H_
