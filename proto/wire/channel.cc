#include "proto/wire/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include "proto/status_macros.h"
#include "proto/wire/keep_alive.h"

namespace prefilld::wire {
namespace {

// A frame is 1 to 4 MiB, and a single block of 128 tokens of a large model can be more.
constexpr int kMaxMessageBytes = 64 << 20;
// With this size frames cross the wire in few HTTP/2 frames, and the next one flows while one is
// verified.
constexpr int kHttp2FrameBytes = 4 << 20;
constexpr int kLookaheadBytes = 8 << 20;

}  // namespace

std::shared_ptr<grpc::Channel> OpenChannel(
    const std::string& target, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    const std::string& server_name) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  for (const auto& [name, value] : kKeepAliveArguments) arguments.SetInt(name, value);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2FrameBytes);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kLookaheadBytes);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  if (!server_name.empty()) arguments.SetSslTargetNameOverride(server_name);
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ChannelOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(const auto credentials, MakeChannelCredentials(options.tls));
  return OpenChannel(options.address, credentials,
                     options.tls.has_value() ? options.tls->server_name : "");
}

}  // namespace prefilld::wire
