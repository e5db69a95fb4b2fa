// Network addresses as operators and requests write them.
#ifndef PREFILLD_SERVER_HOST_PORT_H_
#define PREFILLD_SERVER_HOST_PORT_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace prefilld::server {

struct HostPort {
  std::string host;  // a name, an IPv4 address, or an IPv6 address without its brackets
  int port = 0;      // 0 to 65535
};

// "name:port", "1.2.3.4:port" or "[::1]:port"; nothing else (no schemes, no paths).
std::optional<HostPort> ParseHostPort(absl::string_view text);

// '*' in the pattern stands for any run of characters, the empty one included.
bool MatchesPattern(absl::string_view pattern, absl::string_view text);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_HOST_PORT_H_
