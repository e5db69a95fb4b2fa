#include "proto/wire/packet_socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "proto/status_macros.h"

namespace prefilld::wire {
namespace {

constexpr absl::string_view kPathScheme = "unix:";
constexpr absl::string_view kAbstractScheme = "unix-abstract:";

struct PacketAddress {
  sockaddr_un address = {};
  socklen_t length = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

absl::Status SystemError(absl::string_view call) {
  return absl::UnavailableError(absl::StrCat(call, ": ", std::strerror(errno)));
}

// The name of an abstract socket begins behind a zero and has no end but its length.
absl::StatusOr<PacketAddress> ParsePacketAddress(const std::string& text) {
  absl::string_view name = text;
  PacketAddress result;
  result.address.sun_family = AF_UNIX;
  const bool is_abstract = absl::ConsumePrefix(&name, kAbstractScheme);
  if (!is_abstract && !absl::ConsumePrefix(&name, kPathScheme)) {
    return absl::UnavailableError("it is neither unix:/PATH nor unix-abstract:NAME");
  }
  if (name.empty() || name.size() + 1 > sizeof result.address.sun_path) {
    return absl::UnavailableError(absl::StrCat("its name has ", name.size(), " characters; 1 to ",
                                               sizeof result.address.sun_path - 1));
  }
  name.copy(result.address.sun_path + (is_abstract ? 1 : 0), name.size());
  result.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size() + 1);
  return result;
}

absl::StatusOr<Descriptor> NewPacketSocket() {
  Descriptor fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return SystemError("socket");
  return fd;
}

// Room for so many descriptors. The system closes those that find none.
template <size_t descriptors>
union ControlBuffer {
  cmsghdr header;
  std::array<char, CMSG_SPACE(descriptors * sizeof(int))> bytes;
};

std::vector<Descriptor> TakeDescriptors(msghdr& packet) {
  std::vector<Descriptor> taken;
  for (cmsghdr* header = CMSG_FIRSTHDR(&packet); header != nullptr;
       header = CMSG_NXTHDR(&packet, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
      taken.emplace_back(fd);
    }
  }
  return taken;
}

}  // namespace

// A queue of callers that is full counts as nobody there: whoever connects has another way.
absl::StatusOr<PacketSocket> PacketSocket::Connect(const std::string& address) {
  PREFILLD_ASSIGN_OR_RETURN(const PacketAddress peer, ParsePacketAddress(address));
  PREFILLD_ASSIGN_OR_RETURN(Descriptor fd, NewPacketSocket());
  if (connect(fd.get(), peer.get(), peer.length) == 0) return PacketSocket(std::move(fd));
  if (errno == ECONNREFUSED) return absl::NotFoundError("connect: nobody listens there");
  return SystemError("connect");
}

absl::Status PacketSocket::Await(short events, absl::Duration timeout) const {
  pollfd entry = {.fd = fd_.get(), .events = events, .revents = 0};
  const auto milliseconds = static_cast<int>(absl::ToInt64Milliseconds(timeout));
  int ready = 0;
  do {
    ready = poll(&entry, 1, milliseconds);
  } while (ready < 0 && errno == EINTR);
  if (ready < 0) return SystemError("poll");
  if (ready == 0) return absl::DeadlineExceededError("the peer said nothing");
  return absl::OkStatus();
}

absl::Status PacketSocket::Send(const google::protobuf::MessageLite& message,
                                absl::Duration timeout, int descriptor) {
  std::string bytes = message.SerializeAsString();
  iovec piece = {.iov_base = bytes.data(), .iov_len = bytes.size()};
  msghdr packet = {};
  packet.msg_iov = &piece;
  packet.msg_iovlen = 1;
  ControlBuffer<1> control = {};
  if (descriptor >= 0) {
    packet.msg_control = control.bytes.data();
    packet.msg_controllen = control.bytes.size();
    cmsghdr* const header = CMSG_FIRSTHDR(&packet);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof descriptor);
    std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  }
  while (sendmsg(fd_.get(), &packet, MSG_NOSIGNAL) < 0) {
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return SystemError("sendmsg");
    PREFILLD_RETURN_IF_ERROR(Await(POLLOUT, timeout));
  }
  return absl::OkStatus();
}

absl::Status PacketSocket::Receive(google::protobuf::MessageLite& message, absl::Duration timeout,
                                   std::vector<Descriptor>* descriptors) {
  std::array<char, kMaxPacketBytes> bytes;
  iovec piece = {.iov_base = bytes.data(), .iov_len = bytes.size()};
  msghdr packet = {};
  packet.msg_iov = &piece;
  packet.msg_iovlen = 1;
  ControlBuffer<kMaxDescriptors> control = {};
  if (descriptors != nullptr) {
    packet.msg_control = control.bytes.data();
    packet.msg_controllen = control.bytes.size();
  }
  ssize_t size = 0;
  while ((size = recvmsg(fd_.get(), &packet, MSG_CMSG_CLOEXEC)) < 0) {
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return SystemError("recvmsg");
    PREFILLD_RETURN_IF_ERROR(Await(POLLIN, timeout));
  }
  if (descriptors != nullptr) *descriptors = TakeDescriptors(packet);
  if (size == 0) return absl::UnavailableError("the peer has closed the connection");
  if ((packet.msg_flags & MSG_TRUNC) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a packet has more than ", kMaxPacketBytes, " bytes"));
  }
  if (!message.ParseFromArray(bytes.data(), static_cast<int>(size))) {
    return absl::InvalidArgumentError("a packet is no message");
  }
  return absl::OkStatus();
}

void PacketSocket::Shutdown() { shutdown(fd_.get(), SHUT_RDWR); }

bool IsOfThisBoot(absl::string_view network) {
  const absl::string_view own = NetworkOfThisProcess();
  const absl::string_view boot = own.substr(0, own.find('/'));
  return !boot.empty() && network.substr(0, network.find('/')) == boot;
}

absl::StatusOr<Descriptor> ListenForPackets(const std::string& address) {
  PREFILLD_ASSIGN_OR_RETURN(const PacketAddress own, ParsePacketAddress(address));
  PREFILLD_ASSIGN_OR_RETURN(Descriptor fd, NewPacketSocket());
  if (bind(fd.get(), own.get(), own.length) != 0) return SystemError("bind");
  if (listen(fd.get(), SOMAXCONN) != 0) return SystemError("listen");
  return fd;
}

const std::string& NetworkOfThisProcess() {
  static const std::string& name = *new std::string([] {
    std::string boot;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
    std::array<char, 64> space = {};
    const ssize_t length = readlink("/proc/self/ns/net", space.data(), space.size());
    if (boot.empty() || length <= 0) return std::string();
    return absl::StrCat(boot, "/", absl::string_view(space.data(), static_cast<size_t>(length)));
  }());
  return name;
}

}  // namespace prefilld::wire
