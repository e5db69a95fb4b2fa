// The sockets that a program listens on.
#ifndef PREFILLD_PROTO_WIRE_LISTENING_SOCKETS_H_
#define PREFILLD_PROTO_WIRE_LISTENING_SOCKETS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/wire/descriptor.h"

namespace prefilld::wire {

struct ListeningSockets {
  std::vector<Descriptor> sockets;  // non-blocking
  int port = 0;                     // the one that was bound first; 0: Unix sockets alone
  // The addresses by which this process reaches them itself, one for each of the list: IPv4:port,
  // [IPv6]:port or unix:/path.
  std::vector<std::string> own_addresses;
};

// Binds each of a list of addresses, separated by commas, and listens.
//
// - host:port; port 0 is any free one. A name is bound with all of its addresses. A wildcard is
//   bound for IPv4 and IPv6 alike where the machine has both. No second process can share the port.
// - unix:/path. A socket that a process left behind is replaced, one that is served is not.
//
// UNAVAILABLE: one of them cannot be bound; the message says which and why.
absl::StatusOr<ListeningSockets> ListenOn(const std::string& addresses);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_LISTENING_SOCKETS_H_
