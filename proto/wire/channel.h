// Connections to prefilld and to decode workers.
#ifndef PREFILLD_PROTO_WIRE_CHANNEL_H_
#define PREFILLD_PROTO_WIRE_CHANNEL_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/wire/keep_alive.h"
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

// Opens a channel, with a connection of its own, to a receiver of pushed KV. A receiver may be any
// gRPC server, and one that was not told otherwise ends a connection that pings it more than a few
// times without sending a message. So after `silence` without a word from it, it is pinged at most
// twice until the next message is sent.
std::shared_ptr<grpc::Channel> OpenPushChannel(
    const std::string& target, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    absl::Duration silence = absl::Milliseconds(kKeepAliveTimeMs));

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_CHANNEL_H_
