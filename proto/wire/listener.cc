#include "proto/wire/listener.h"

#include <algorithm>
#include <limits>

#include <grpc/grpc.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "proto/wire/keep_alive.h"

namespace prefilld::wire {
namespace {

constexpr int64_t kMaxStreams = 1 << 16;

// Keeps gRPC initialised to the end of the process. Shutting it down with the last server would
// wait up to 10 s for its backup poller.
void KeepGrpcInitialized() {
  static const bool initialized = [] {
    grpc_init();
    return true;
  }();
  (void)initialized;
}

void SetLimits(const ListenOptions& options, grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(static_cast<int>(
      std::min<int64_t>(options.max_request_bytes, std::numeric_limits<int32_t>::max())));
  builder.SetMaxSendMessageSize(-1);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                             static_cast<int>(std::min(options.max_streams, kMaxStreams)));
}

void SetKeepAlive(grpc::ServerBuilder& builder) {
  for (const auto& [name, value] : kKeepAliveArguments) builder.AddChannelArgument(name, value);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinPingIntervalMs);
}

}  // namespace

absl::StatusOr<Listener> Listen(const ListenOptions& options,
                                absl::Span<grpc::Service* const> services) {
  KeepGrpcInitialized();
  PREFILLD_ASSIGN_OR_RETURN(const auto credentials, MakeServerCredentials(options.tls));
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetLimits(options, builder);
  SetKeepAlive(builder);
  // Otherwise a second process on the same port would take half of the connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  Listener listener;
  builder.AddListeningPort(options.address, credentials, &listener.port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  listener.server = builder.BuildAndStart();
  if (listener.server == nullptr || listener.port == 0) {
    return absl::UnavailableError(
        absl::StrCat("--listen=", options.address,
                     " cannot be served: the address is taken or not ours, or the TLS files are "
                     "not a matching certificate and key"));
  }
  return listener;
}

}  // namespace prefilld::wire
