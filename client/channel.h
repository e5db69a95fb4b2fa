// Connections to prefilld and to decode workers.
#ifndef PREFILLD_CLIENT_CHANNEL_H_
#define PREFILLD_CLIENT_CHANNEL_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"

namespace grpc {
class Channel;
}

namespace prefilld::client {

// PEM files.
struct TlsOptions {
  std::string ca_file;    // empty: the system's certificates
  std::string cert_file;  // with key_file: what we show to a server that asks (mutual TLS)
  std::string key_file;
  std::string server_name;  // the name to verify, if it is not the address's host
};

struct ChannelOptions {
  std::string address;                           // host:port, or any gRPC target
  std::optional<TlsOptions> tls = std::nullopt;  // absent: plain text
};

// A channel with a connection of its own, shared with no other channel of the process: lanes of
// one transfer must not end up on one TCP connection. Connects lazily.
//
// A peer that vanished without a word is noticed by keep-alive pings within about 40 s. They are
// sent only while a call is open. prefilld sends progress every few seconds, which also resets the
// count of pings that a server holds against its client.
//
// INVALID_ARGUMENT: a TLS file cannot be read, or only one of cert_file and key_file is given.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ChannelOptions& options);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CHANNEL_H_
