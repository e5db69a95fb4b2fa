// Tells what the peers of sockets take, as this machine's kernel knows. gRPC tells only when a
// whole message is gone.
#ifndef PREFILLD_PROTO_WIRE_SOCKET_USE_H_
#define PREFILLD_PROTO_WIRE_SOCKET_USE_H_

#include <sys/socket.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace prefilld::wire {

// Writes an address as grpc::ServerContext::peer() and ClientContext::peer() do: IPv4 addresses of
// an IPv6 socket as IPv4, and the brackets of IPv6 as in a URI. Empty: it is not TCP's.
std::string PeerName(const sockaddr_storage& address);

// Returns how many bytes the peer's machine has acknowledged since the TCP connection was opened.
int64_t BytesAcknowledged(int fd);

// Returns how many bytes have come over the TCP connection since it was opened; the end of the
// peer's bytes counts as one.
int64_t BytesReceived(int fd);

// Returns for how long the peer's machine has not answered what is sent to it again and again over
// a TCP connection; 0 if nothing has to be sent again. A machine whose process does not read its
// socket is asked at intervals that grow to minutes, and answers each time.
absl::Duration UnansweredFor(int fd);

// The connections of this process to one peer, by TCP or a Unix socket. gRPC does not show the
// sockets of its channels, so they are looked up among the process's open descriptors. Not
// thread-safe.
class SocketsToPeer {
 public:
  // Returns how many bytes the peer has taken since its sockets were found, or nullopt if there are
  // none yet. `peer` is written as PeerName does, or is unix:/path. Looks for sockets five times a
  // second until it finds some. Of a Unix socket, whose peer acknowledges nothing, it is by how
  // much what waits in it has changed from one call to the next.
  std::optional<int64_t> BytesTaken(const std::string& peer, absl::Time now);

 private:
  // A descriptor may be closed and its number used again; the inode tells.
  struct Socket {
    int fd;
    uint64_t inode;
    bool is_unix;
    int64_t seen;  // acknowledged, or waiting in a Unix socket
  };

  void Find(const std::string& peer);

  std::vector<Socket> sockets_;
  int64_t taken_ = 0;
  absl::Time next_search_ = absl::InfinitePast();
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_SOCKET_USE_H_
