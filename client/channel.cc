#include "client/channel.h"

#include "absl/status/status.h"
#include "client/pem_file.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"

namespace prefilld::client {
namespace {

constexpr int kKeepAliveTimeMs = 30'000;
constexpr int kKeepAliveTimeoutMs = 10'000;
// A frame is 1 to 4 MiB, and a single block of 128 tokens of a large model can be more.
constexpr int kMaxMessageBytes = 64 << 20;
// Frames cross the wire in few HTTP/2 frames, and the next one flows while one is verified.
constexpr int kHttp2FrameBytes = 4 << 20;
constexpr int kLookaheadBytes = 8 << 20;

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(
    const std::optional<TlsOptions>& tls) {
  if (!tls) return grpc::InsecureChannelCredentials();
  if (tls->cert_file.empty() != tls->key_file.empty()) {
    return absl::InvalidArgumentError("TLS cert_file and key_file go together; only one is set");
  }
  absl::StatusOr<std::string> roots = ReadPemFile("TLS ca_file", tls->ca_file);
  if (!roots.ok()) return roots.status();
  absl::StatusOr<std::string> cert = ReadPemFile("TLS cert_file", tls->cert_file);
  if (!cert.ok()) return cert.status();
  absl::StatusOr<std::string> key = ReadPemFile("TLS key_file", tls->key_file);
  if (!key.ok()) return key.status();
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = *std::move(roots);
  ssl.pem_cert_chain = *std::move(cert);
  ssl.pem_private_key = *std::move(key);
  return grpc::SslCredentials(ssl);
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ChannelOptions& options) {
  auto credentials = MakeCredentials(options.tls);
  if (!credentials.ok()) return credentials.status();
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepAliveTimeMs);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepAliveTimeoutMs);
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 0);
  // We send nothing during a long prefill; do not stop pinging because of that.
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kLookaheadBytes);
  args.SetMaxReceiveMessageSize(kMaxMessageBytes);
  if (options.tls && !options.tls->server_name.empty()) {
    args.SetSslTargetNameOverride(options.tls->server_name);
  }
  return grpc::CreateCustomChannel(options.address, *credentials, args);
}

}  // namespace prefilld::client
