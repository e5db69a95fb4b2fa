#include "proto/wire/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "proto/wire/host_port.h"
#include "proto/wire/keep_alive.h"

namespace prefilld::wire {
namespace {

// A frame is 1 to 4 MiB, and a single block of 128 tokens of a large model can be more.
constexpr int kMaxMessageBytes = 64 << 20;
// With this size frames cross the wire in few HTTP/2 frames, and the next one flows while one is
// verified.
constexpr int kHttp2FrameBytes = 4 << 20;
constexpr int kLookaheadBytes = 8 << 20;

// The arguments of every channel, to whomever it goes.
grpc::ChannelArguments CommonArguments(bool use_proxy) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  for (const auto& [name, value] : kReconnectArguments) arguments.SetInt(name, value);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, use_proxy ? 1 : 0);
  return arguments;
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ChannelOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(const auto credentials, MakeChannelCredentials(options.tls));
  return OpenChannel(options, credentials);
}

std::shared_ptr<grpc::Channel> OpenChannel(
    const ChannelOptions& options, const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  grpc::ChannelArguments arguments = CommonArguments(options.use_proxy);
  for (const auto& [name, value] : kKeepAliveArguments) arguments.SetInt(name, value);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kLookaheadBytes);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  if (options.tls.has_value() && !options.tls->server_name.empty()) {
    arguments.SetSslTargetNameOverride(options.tls->server_name);
  }
  return grpc::CreateCustomChannel(options.address, credentials, arguments);
}

std::shared_ptr<grpc::Channel> OpenPushChannel(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    const PushChannelOptions& options) {
  grpc::ChannelArguments arguments = CommonArguments(options.use_proxy);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(options.silence)));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(options.patience)));
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 2);
  // Without a scheme gRPC would take "unix:80" for the name of a socket.
  const std::string target =
      UnixSocketPath(address).has_value() ? address : absl::StrCat("dns:///", address);
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

}  // namespace prefilld::wire
