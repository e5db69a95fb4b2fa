#include "proto/wire/listening_sockets.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "proto/wire/host_port.h"

namespace prefilld::wire {
namespace {

struct SocketAddress {
  sockaddr_storage storage = {};
  socklen_t length = 0;

  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  int family() const { return storage.ss_family; }
  in_port_t& port() {
    return family() == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&storage)->sin6_port
                                : reinterpret_cast<sockaddr_in*>(&storage)->sin_port;
  }
};

SocketAddress AnyIpv6() {
  SocketAddress any;
  any.storage.ss_family = AF_INET6;
  any.length = sizeof(sockaddr_in6);
  return any;
}

bool IsWildcard(SocketAddress& address) {
  if (address.family() == AF_INET6) {
    return IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<sockaddr_in6*>(&address.storage)->sin6_addr);
  }
  return reinterpret_cast<sockaddr_in*>(&address.storage)->sin_addr.s_addr == htonl(INADDR_ANY);
}

absl::StatusOr<std::vector<SocketAddress>> Resolve(const HostPort& address) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found);
  if (error != 0) return absl::UnavailableError(gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  std::vector<SocketAddress> addresses;
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    SocketAddress& next = addresses.emplace_back();
    std::memcpy(&next.storage, entry->ai_addr, entry->ai_addrlen);
    next.length = entry->ai_addrlen;
  }
  return addresses;
}

// Without SO_REUSEPORT a second process on the same port is refused. SO_REUSEADDR lets a server
// start again while connections of the one before it are not quite over.
absl::StatusOr<Descriptor> Listen(SocketAddress address, bool both_families) {
  const auto failure = [] { return absl::UnavailableError(std::strerror(errno)); };
  Descriptor fd(socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return failure();
  const int on = 1, v6_only = both_families ? 0 : 1;
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (address.family() == AF_INET6 &&
      setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &v6_only, sizeof v6_only) != 0) {
    return failure();
  }
  if (bind(fd.get(), address.get(), address.length) != 0) return failure();
  if (listen(fd.get(), SOMAXCONN) != 0) return failure();
  return fd;
}

SocketAddress BoundAddress(const Descriptor& fd) {
  SocketAddress bound;
  bound.length = sizeof bound.storage;
  getsockname(fd.get(), bound.get(), &bound.length);
  return bound;
}

std::string OwnAddress(SocketAddress bound, bool both_families) {
  const int port = ntohs(bound.port());
  const bool v6 = bound.family() == AF_INET6;
  if (IsWildcard(bound)) return absl::StrCat(v6 && !both_families ? "[::1]:" : "127.0.0.1:", port);
  char text[INET6_ADDRSTRLEN] = {};
  const void* in =
      v6 ? static_cast<const void*>(&reinterpret_cast<sockaddr_in6*>(&bound.storage)->sin6_addr)
         : &reinterpret_cast<sockaddr_in*>(&bound.storage)->sin_addr;
  inet_ntop(bound.family(), in, text, sizeof text);
  return v6 ? absl::StrCat("[", text, "]:", port) : absl::StrCat(text, ":", port);
}

absl::StatusOr<ListeningSockets> ListenOnHost(const std::string& address) {
  const std::optional<HostPort> host_port = ParseHostPort(address);
  if (!host_port.has_value()) return absl::UnavailableError("it is not host:port");
  PREFILLD_ASSIGN_OR_RETURN(std::vector<SocketAddress> addresses, Resolve(*host_port));
  ListeningSockets result;
  absl::Status failure = absl::UnavailableError("the host has no address");
  for (SocketAddress& next : addresses) {
    // One socket serves both families, if the machine has IPv6.
    bool both_families = IsWildcard(next);
    next.port() = htons(result.port != 0 ? result.port : host_port->port);
    absl::StatusOr<Descriptor> fd = absl::UnavailableError("");
    if (both_families) {
      SocketAddress any = AnyIpv6();
      any.port() = next.port();
      fd = Listen(any, /*both_families=*/true);
    }
    if (!fd.ok()) {
      both_families = false;
      fd = Listen(next, /*both_families=*/false);
    }
    if (!fd.ok()) {
      failure = fd.status();
      continue;
    }
    SocketAddress bound = BoundAddress(*fd);
    if (result.sockets.empty()) {
      result.port = ntohs(bound.port());
      result.own_addresses = {OwnAddress(bound, both_families)};
    }
    result.sockets.push_back(*std::move(fd));
    if (both_families) break;
  }
  if (result.sockets.empty()) return failure;
  return result;
}

// Tells whether somebody serves the socket.
bool IsServed(const sockaddr_un& address) {
  const Descriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const auto* peer = reinterpret_cast<const sockaddr*>(&address);
  // A queue of callers that is full is served as well.
  return fd.valid() && (connect(fd.get(), peer, sizeof address) == 0 || errno == EAGAIN);
}

bool IsSocket(const std::string& path) {
  struct stat facts = {};
  return lstat(path.c_str(), &facts) == 0 && S_ISSOCK(facts.st_mode);
}

absl::StatusOr<ListeningSockets> ListenOnPath(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  if (IsServed(address)) return absl::UnavailableError("another process serves it");
  if (IsSocket(path)) unlink(path.c_str());
  ListeningSockets result;
  Descriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid() || bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
      listen(fd.get(), SOMAXCONN) != 0) {
    return absl::UnavailableError(std::strerror(errno));
  }
  result.sockets.push_back(std::move(fd));
  result.own_addresses = {absl::StrCat("unix:", path)};
  return result;
}

}  // namespace

absl::StatusOr<ListeningSockets> ListenOn(const std::string& addresses) {
  ListeningSockets all;
  for (const std::string& address : SplitAddresses(addresses)) {
    const std::optional<std::string> path = UnixSocketPath(address);
    absl::StatusOr<ListeningSockets> one = path ? ListenOnPath(*path) : ListenOnHost(address);
    if (!one.ok()) {
      return absl::UnavailableError(absl::StrCat(address, ": ", one.status().message()));
    }
    if (all.port == 0) all.port = one->port;
    std::move(one->own_addresses.begin(), one->own_addresses.end(),
              std::back_inserter(all.own_addresses));
    std::move(one->sockets.begin(), one->sockets.end(), std::back_inserter(all.sockets));
  }
  return all;
}

}  // namespace prefilld::wire
