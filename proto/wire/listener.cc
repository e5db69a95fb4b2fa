#include "proto/wire/listener.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include <grpc/grpc.h>
#include <grpcpp/ext/health_check_service_server_builder_option.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server_builder.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "proto/wire/health_service.h"
#include "proto/wire/keep_alive.h"

namespace prefilld::wire {
namespace {

constexpr int64_t kMaxStreams = 1 << 16;
// A request is here within milliseconds unless its sender is slow, so that few are read at once.
constexpr int64_t kMaxReadAtOnce = 32;
constexpr int64_t kLeastReceiveMemory = int64_t{256} << 20;
// Reflection is the one service that takes a thread for each open call; more calls are refused.
constexpr int kMaxBlockingThreads = 32;
constexpr int kHandshakeTimeoutMs = 20'000;
constexpr int kMaxIdleMs = 300'000;
constexpr absl::Duration kPatience = absl::Seconds(30);

// Keeps gRPC initialised to the end of the process. Shutting it down with the last server would
// wait up to 10 s for its backup poller.
void KeepGrpcInitialized() {
  static const bool initialized = [] {
    grpc_init();
    return true;
  }();
  (void)initialized;
}

int64_t ReceiveMemory(const ListenOptions& options) {
  if (options.receive_memory_bytes > 0) return options.receive_memory_bytes;
  return std::max(kLeastReceiveMemory, 16 * options.max_request_bytes);
}

// Replaces gRPC's own health service and bounds its reflection. Three quarters of the memory are
// for requests that are read, so that gRPC does not end any for the want of it.
void BoundArrivals(const ListenOptions& options, grpc::ServerBuilder& builder) {
  Arrivals& arrivals = *options.arrivals;
  const int64_t largest = std::max<int64_t>(1, options.max_request_bytes);
  arrivals.set_max_read_at_once(
      std::clamp<int64_t>(ReceiveMemory(options) / 4 * 3 / largest, 1, kMaxReadAtOnce));
  auto health = std::make_unique<HealthService>(arrivals);
  builder.RegisterService(health.get());
  builder.SetOption(
      std::make_unique<grpc::HealthCheckServiceServerBuilderOption>(std::move(health)));
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> factories;
  factories.push_back(arrivals.WatchReflection());
  builder.experimental().SetInterceptorCreators(std::move(factories));
}

void SetLimits(const ListenOptions& options, grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(static_cast<int>(
      std::min<int64_t>(options.max_request_bytes, std::numeric_limits<int32_t>::max())));
  builder.SetMaxSendMessageSize(-1);
  const int64_t memory = ReceiveMemory(options);
  grpc::ResourceQuota quota("listener");
  quota.Resize(static_cast<size_t>(memory)).SetMaxThreads(kMaxBlockingThreads);
  builder.SetResourceQuota(quota);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, options.streams_arrive ? 1 : 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                             static_cast<int>(std::min(options.max_streams, kMaxStreams)));
}

// Pings find a peer that is not there although something on the way answers for it. A process that
// is stopped is not gone: its calls end by their own stall time-outs, so pings are more patient.
void SetKeepAlive(const ListenOptions& options, grpc::ServerBuilder& builder) {
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepAliveTimeMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(
      GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
      static_cast<int>(absl::ToInt64Milliseconds(2 * options.stall_timeout + kPatience)));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinPingIntervalMs);
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, kMaxIdleMs);
}

absl::Status CannotBeServed(const ListenOptions& options, absl::string_view reason) {
  return absl::UnavailableError(
      absl::StrCat("--listen=", options.address, " cannot be served: ", reason));
}

}  // namespace

Listener::Listener(std::unique_ptr<Connections> connections)
    : connections_(std::move(connections)) {}

absl::StatusOr<std::unique_ptr<Listener>> Listener::Create(
    const ListenOptions& options, absl::Span<grpc::Service* const> services) {
  KeepGrpcInitialized();
  std::unique_ptr<ServerCertificates> certificates;
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
  if (!options.tls.cert_file.empty()) {
    PREFILLD_ASSIGN_OR_RETURN(certificates, ServerCertificates::Load(options.tls));
    credentials = certificates->Credentials();
  }
  auto connections =
      Connections::Bind(options.address, {.max_connections = options.max_connections,
                                          .says_why = options.tls.cert_file.empty(),
                                          .stuck = 2 * options.stall_timeout + kPatience});
  if (!connections.ok()) return CannotBeServed(options, connections.status().message());

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetLimits(options, builder);
  SetKeepAlive(options, builder);
  if (options.arrivals != nullptr) BoundArrivals(options, builder);
  auto acceptor = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, credentials);
  for (grpc::Service* service : services) builder.RegisterService(service);
  std::unique_ptr<Listener> listener(new Listener(*std::move(connections)));
  listener->certificates_ = std::move(certificates);
  if (options.arrivals != nullptr) {
    options.arrivals->set_on_call([&connections = *listener->connections_](absl::string_view peer) {
      connections.NoteCall(peer);
    });
  }
  listener->server_ = builder.BuildAndStart();
  if (listener->server_ == nullptr) {
    return CannotBeServed(options, "gRPC does not start; the log may say why");
  }
  std::function<void(absl::Time)> every_second;
  if (options.arrivals != nullptr) {
    every_second = [&arrivals = *options.arrivals](absl::Time now) { arrivals.EndLate(now); };
  }
  listener->connections_->Start(std::move(acceptor), std::move(every_second));
  return listener;
}

Listener::~Listener() {
  if (server_ != nullptr) Shutdown(absl::ZeroDuration());
}

// A connection that gRPC is handed after its end would be leaked.
void Listener::Shutdown(absl::Duration grace) {
  connections_->Stop();
  server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
  server_->Wait();
}

}  // namespace prefilld::wire
