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
  std::string address;                           // host:port, unix:/path, or any gRPC target
  std::optional<ChannelTls> tls = std::nullopt;  // absent: plain text
  // Connect through the HTTP proxy that grpc_proxy, https_proxy or http_proxy names. A host has
  // these variables for its downloads, and a cache of gigabytes must not take that way unasked.
  bool use_proxy = false;
  // File with a bearer token that a client of prefilld shows with its requests; empty: none.
  std::string token_file = "";
  // A token in plain text is everybody's on the way, and nothing takes it back. So it goes over TLS
  // and Unix sockets alone, unless somebody who knows the network wants it otherwise.
  bool token_without_tls = false;
};

// Opens a channel with a connection of its own, shared with no other channel of the process,
// because lanes of one transfer must not share a TCP connection. It connects lazily. While the peer
// is away it is tried again at least every 2 seconds or so (keep_alive.h).
//
// Keep-alive pings, sent only while a call is open, notice within half a minute that a peer
// vanished without a word.
//
// INVALID_ARGUMENT: as MakeChannelCredentials.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ChannelOptions& options);

// Does the same with credentials that MakeChannelCredentials made of options.tls. They have a
// thread that watches the files, so those who open many channels make them once.
std::shared_ptr<grpc::Channel> OpenChannel(
    const ChannelOptions& options, const std::shared_ptr<grpc::ChannelCredentials>& credentials);

struct PushChannelOptions {
  bool use_proxy = false;  // as in ChannelOptions
  absl::Duration silence = absl::Milliseconds(kKeepAliveTimeMs);
  absl::Duration patience = absl::Milliseconds(kKeepAliveTimeoutMs);
};

// Opens a channel, with a connection of its own, to a receiver of pushed KV at `address`, host:port
// or unix:/path. A receiver may be any gRPC server, and one that was not told otherwise ends a
// connection that pings it more than a few times without sending a message. So after
// `options.silence` without a word from it, it is pinged at most twice until the next message is
// sent. It has `options.patience` to answer, and to take what was sent: that must be more than a
// consumer's stall time-out, which is the reason to give when it takes nothing.
std::shared_ptr<grpc::Channel> OpenPushChannel(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    const PushChannelOptions& options = {});

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_CHANNEL_H_
