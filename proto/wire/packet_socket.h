// Unix sockets that carry messages in packets, and a descriptor beside a message.
#ifndef PREFILLD_PROTO_WIRE_PACKET_SOCKET_H_
#define PREFILLD_PROTO_WIRE_PACKET_SOCKET_H_

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "google/protobuf/message_lite.h"
#include "proto/wire/descriptor.h"

namespace prefilld::wire {

// One end of a connection of type SOCK_SEQPACKET. Addresses are unix:/PATH and unix-abstract:NAME.
// Thread-safe: a message is sent whole or not at all.
class PacketSocket {
 public:
  // Takes a connected socket that does not block.
  explicit PacketSocket(Descriptor fd) : fd_(std::move(fd)) {}
  // NOT_FOUND: nobody listens there any more; UNAVAILABLE: it cannot be reached for another reason.
  static absl::StatusOr<PacketSocket> Connect(const std::string& address);

  // Sends a message, and the descriptor with it if it is not negative. UNAVAILABLE: the peer is
  // gone; DEADLINE_EXCEEDED: it took nothing for so long.
  absl::Status Send(const google::protobuf::MessageLite& message, absl::Duration timeout,
                    int descriptor = -1);
  // Receives a message. `descriptors` takes those that come with it, kMaxDescriptors at most, and
  // all others are closed. UNAVAILABLE: the peer has closed the connection; DEADLINE_EXCEEDED:
  // nothing came for so long; INVALID_ARGUMENT: the packet is no such message, or has more than
  // kMaxPacketBytes.
  absl::Status Receive(google::protobuf::MessageLite& message, absl::Duration timeout,
                       std::vector<Descriptor>* descriptors = nullptr);
  // Ends the connection; whoever waits on it returns.
  void Shutdown();

  static constexpr size_t kMaxPacketBytes = 1024;
  static constexpr size_t kMaxDescriptors = 2;  // one more than any message has

 private:
  absl::Status Await(short events, absl::Duration timeout) const;

  Descriptor fd_;
};

// Returns what names the boot and the network namespace of this process, of which abstract names
// are. Empty: they cannot be told.
const std::string& NetworkOfThisProcess();

// Tells whether a name of NetworkOfThisProcess comes from this machine since it was started. Who
// says so from elsewhere would have to know the random number of the boot.
bool IsOfThisBoot(absl::string_view network);

// Listens on an address of such sockets. Nobody may have bound it. UNAVAILABLE: says why not.
absl::StatusOr<Descriptor> ListenForPackets(const std::string& address);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_PACKET_SOCKET_H_
