// Network addresses as operators and requests write them: the form of DeliverTo.address and of
// every flag that takes host:port or the path of a Unix socket.
#ifndef PREFILLD_PROTO_WIRE_HOST_PORT_H_
#define PREFILLD_PROTO_WIRE_HOST_PORT_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace prefilld::wire {

struct HostPort {
  std::string host;  // a name, an IPv4 address, or an IPv6 address without its brackets
  int port = 0;      // 0 to 65535
  bool is_name = false;
};

// Parses "name:port", "1.2.3.4:port" or "[::1]:port", and nothing else (no schemes, no paths). A
// host whose last label is a number is an IPv4 address or nothing: some resolvers would take
// "10.1", "0x7f.1" and "167903492" for addresses, too.
std::optional<HostPort> ParseHostPort(absl::string_view text);

// Returns the path of "unix:/path", a socket of this machine; nullopt for anything else. The path
// is absolute, of printable ASCII without commas, and as long as the system allows at most.
std::optional<std::string> UnixSocketPath(absl::string_view text);

// Returns the addresses of a list, "a:1,unix:/b", in its order.
std::vector<std::string> SplitAddresses(absl::string_view list);

// These return `<setting>=<text> is not host:port ...` for an address that is not valid, otherwise
// nullopt. A server may listen on port 0, which stands for any free port; nobody can dial it. TCP
// alone: Unix sockets have no port.
std::optional<std::string> ListenAddressProblem(absl::string_view setting, absl::string_view text);
// These two take unix:/path as well.
std::optional<std::string> ListenOrUnixProblem(absl::string_view setting, absl::string_view text);
std::optional<std::string> DialAddressProblem(absl::string_view setting, absl::string_view text);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_HOST_PORT_H_
