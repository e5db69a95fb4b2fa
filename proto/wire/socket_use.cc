#include "proto/wire/socket_use.h"

#include <arpa/inet.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace prefilld::wire {
namespace {

// One packet or two may be lost on their way.
constexpr int kManyRetransmissions = 3;
constexpr absl::Duration kSearchInterval = absl::Milliseconds(200);

// Returns 0 if the descriptor is no socket.
uint64_t SocketInode(int fd) {
  struct stat facts = {};
  return fstat(fd, &facts) == 0 && S_ISSOCK(facts.st_mode) ? uint64_t{facts.st_ino} : 0;
}

// Returns what was written to a socket and is not taken from it.
int64_t BytesWaiting(int fd) {
  int unsent = 0;
  ioctl(fd, SIOCOUTQ, &unsent);
  return unsent;
}

// Returns "unix:" and the path at which the socket's peer listens; empty: it does at none.
std::string UnixPeerName(const sockaddr_storage& address, socklen_t length) {
  const auto& unix_address = reinterpret_cast<const sockaddr_un&>(address);
  constexpr size_t kBefore = offsetof(sockaddr_un, sun_path);
  if (address.ss_family != AF_UNIX || length <= kBefore || unix_address.sun_path[0] == 0) return "";
  return absl::StrCat("unix:", std::string(unix_address.sun_path,
                                           strnlen(unix_address.sun_path, length - kBefore)));
}

// Zeros if the socket is not TCP's.
tcp_info TcpInfo(int fd) {
  tcp_info info = {};
  socklen_t length = sizeof info;
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return {};
  return info;
}

}  // namespace

std::string PeerName(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = {};
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    return absl::StrCat("ipv4:", text, ":", ntohs(v4.sin_port));
  }
  if (address.ss_family != AF_INET6) return "";
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
  if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
    inet_ntop(AF_INET, &v6.sin6_addr.s6_addr[12], text, sizeof text);
    return absl::StrCat("ipv4:", text, ":", ntohs(v6.sin6_port));
  }
  inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
  return absl::StrCat("ipv6:%5B", text, "%5D:", ntohs(v6.sin6_port));
}

int64_t BytesAcknowledged(int fd) { return static_cast<int64_t>(TcpInfo(fd).tcpi_bytes_acked); }

int64_t BytesReceived(int fd) { return static_cast<int64_t>(TcpInfo(fd).tcpi_bytes_received); }

absl::Duration UnansweredFor(int fd) {
  const tcp_info info = TcpInfo(fd);
  if (info.tcpi_retransmits < kManyRetransmissions) return absl::ZeroDuration();
  return absl::Milliseconds(info.tcpi_last_ack_recv);
}

std::optional<int64_t> SocketsToPeer::BytesTaken(const std::string& peer, absl::Time now) {
  // Before the call has a connection its peer is the target, as it was written.
  const bool is_address = absl::StartsWith(peer, "ipv4:") || absl::StartsWith(peer, "ipv6:") ||
                          absl::StartsWith(peer, "unix:/");
  if (!is_address) return std::nullopt;
  if (sockets_.empty() && now >= next_search_) {
    next_search_ = now + kSearchInterval;
    Find(peer);
  }
  if (sockets_.empty()) return std::nullopt;
  for (Socket& socket : sockets_) {
    if (SocketInode(socket.fd) != socket.inode) continue;  // closed
    const int64_t now_seen =
        socket.is_unix ? BytesWaiting(socket.fd) : BytesAcknowledged(socket.fd);
    taken_ += std::abs(now_seen - socket.seen);
    socket.seen = now_seen;
  }
  return taken_;
}

void SocketsToPeer::Find(const std::string& peer) {
  std::error_code error;  // descriptors come and go while this looks at them
  for (std::filesystem::directory_iterator entry("/proc/self/fd", error), end;
       !error && entry != end; entry.increment(error)) {
    int fd = -1;
    if (!absl::SimpleAtoi(entry->path().filename().string(), &fd)) continue;
    const uint64_t inode = SocketInode(fd);
    sockaddr_storage address = {};
    socklen_t length = sizeof address;
    if (inode == 0 || getpeername(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0)
      continue;
    const bool is_unix = address.ss_family == AF_UNIX;
    if ((is_unix ? UnixPeerName(address, length) : PeerName(address)) != peer) continue;
    sockets_.push_back({.fd = fd,
                        .inode = inode,
                        .is_unix = is_unix,
                        .seen = is_unix ? BytesWaiting(fd) : BytesAcknowledged(fd)});
  }
}

}  // namespace prefilld::wire
