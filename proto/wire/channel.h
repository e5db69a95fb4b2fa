// Connections to prefilld and to decode workers.
#ifndef PREFILLD_PROTO_WIRE_CHANNEL_H_
#define PREFILLD_PROTO_WIRE_CHANNEL_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "proto/wire/tls.h"

namespace grpc {
class Channel;
}

namespace prefilld::wire {

struct ChannelOptions {
  std::string address;                           // host:port, or any gRPC target
  std::optional<ChannelTls> tls = std::nullopt;  // absent: plain text
};

// Opens a channel with a connection of its own, shared with no other channel of the process,
// because lanes of one transfer must not share a TCP connection. It connects lazily.
//
// Keep-alive pings, sent only while a call is open, notice within half a minute that a peer
// vanished without a word.
//
// INVALID_ARGUMENT: as MakeChannelCredentials.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ChannelOptions& options);

// Opens the same kind of channel with given credentials, for many channels to changing targets.
std::shared_ptr<grpc::Channel> OpenChannel(
    const std::string& target, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    const std::string& server_name = "");

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_CHANNEL_H_
