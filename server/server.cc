#include "server/server.h"

#include <algorithm>
#include <thread>
#include <utility>

#include <grpc/grpc.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "server/health.h"
#include "server/log.h"
#include "server/prefill_service.h"
#include "server/push_stream.h"
#include "server/tls.h"
#include "server/version.h"
#include "server/watchdog.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

// Dead peers are noticed within half a minute, and clients may ping every 10 s while a long
// prefill is silent.
constexpr int kKeepaliveMs = 20'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
constexpr int kMinClientPingMs = 5'000;

// Calls that are in flight when the server is destroyed have so long to unwind.
constexpr absl::Duration kShutdownTime = absl::Seconds(5);

// Prompts a good deal too long are still read, so that the caller is told the limit.
int64_t MaxRequestBytes(int64_t max_prompt_tokens) {
  constexpr int64_t kVarintBytes = 5;
  constexpr int64_t kOtherFields = int64_t{1} << 20;
  return std::min<int64_t>(2 * kVarintBytes * max_prompt_tokens + kOtherFields, INT32_MAX);
}

// Unwinding gRPC's globals with the last server waits up to 10 s for its backup poller; the process
// keeps them instead.
void KeepGrpcInitialized() {
  static const bool initialized = [] {
    grpc_init();
    return true;
  }();
  (void)initialized;
}

void SetTransportLimits(const ServerOptions& options, int64_t max_prompt_tokens,
                        grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(static_cast<int>(MaxRequestBytes(max_prompt_tokens)));
  builder.SetMaxSendMessageSize(-1);
  // Per connection: every request that can be live, probes, and as much again.
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                             static_cast<int>(std::min<int64_t>(
                                 2 * (options.queue_capacity + options.max_lanes) + 64, 1 << 16)));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinClientPingMs);
  // A second process on the same port would take half of the connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
}

v1::ServerInfo DescribeServer(const ServerOptions& options, const model::EngineInfo& engine,
                              const model::AttentionOptions& attention) {
  v1::ServerInfo info;
  info.set_version(kVersion);
  info.set_model_name(engine.model_name);
  info.set_model_fingerprint(engine.fingerprint);
  info.set_device(engine.device_name);
  info.set_native_dtype(ToProto(engine.native_dtype));
  info.set_vocab_size(engine.config.vocab_size);
  info.set_num_layers(engine.config.num_layers);
  info.set_num_heads(engine.config.num_heads);
  info.set_num_kv_heads(engine.config.num_kv_heads);
  info.set_head_dim(engine.config.head_dim);
  info.set_max_prompt_tokens(engine.max_tokens);
  info.set_max_lanes(options.max_lanes);
  info.set_default_policy(ToProto(attention.policy));
  for (const auto policy : options.allowed_policies) info.add_allowed_policies(ToProto(policy));
  info.set_crossover_tokens(attention.crossover_tokens);
  info.set_queue_capacity(options.queue_capacity);
  for (const uint32_t id : engine.config.eos_token_ids) info.add_eos_token_ids(id);
  return info;
}

}  // namespace

PrefillServer::PrefillServer(model::PrefillEngine& engine, const Clock& clock)
    : engine_(engine), clock_(clock), progress_(clock) {}

absl::StatusOr<std::unique_ptr<PrefillServer>> PrefillServer::Create(const ServerOptions& options,
                                                                     model::PrefillEngine& engine,
                                                                     const Clock& clock) {
  KeepGrpcInitialized();
  std::unique_ptr<PrefillServer> server(new PrefillServer(engine, clock));
  server->timeouts_.stall = options.stall_timeout;
  server->timeouts_.min_consumer_bytes_per_s = options.min_consumer_mb_per_s * 1e6;
  server->metrics_ = std::make_unique<Metrics>(engine.info());
  PREFILLD_RETURN_IF_ERROR(server->CreateStaging(options));
  server->CreateScheduler(options);
  PREFILLD_RETURN_IF_ERROR(server->CreateService(options));
  PREFILLD_RETURN_IF_ERROR(server->StartListening(options));
  PREFILLD_RETURN_IF_ERROR(server->StartMetrics(options));
  server->StartWatchdog(options);
  server->health_->SetReady(true);
  return server;
}

// A buffer must hold at least one block of the widest layout, whatever the flag says.
absl::Status PrefillServer::CreateStaging(const ServerOptions& options) {
  const int64_t buffer_bytes = std::max(options.frame_bytes, MaxBlockBytes(engine_.info().config));
  const int64_t num_buffers = std::max<int64_t>(options.staging_bytes / buffer_bytes, 4);
  auto ring = StagingRing::Create(engine_, static_cast<int>(num_buffers), buffer_bytes);
  if (!ring.ok()) {
    return absl::Status(
        ring.status().code(),
        absl::StrCat("--staging_bytes=", options.staging_bytes, ": ", ring.status().message()));
  }
  ring_ = *std::move(ring);
  return absl::OkStatus();
}

void PrefillServer::CreateScheduler(const ServerOptions& options) {
  const int quarter = static_cast<int>(std::thread::hardware_concurrency() / 4);
  const int threads = options.pack_threads > 0 ? options.pack_threads : std::clamp(quarter, 1, 4);
  packer_ = std::make_unique<KvPacker>(
      KvPacker::Surroundings{
          .ring = *ring_, .metrics = *metrics_, .progress = progress_, .wake = wake_},
      engine_.kv_slots(), threads);
  constexpr int64_t kDefaultQueuedPrompts = 8;
  const QueueLimits limits{
      .capacity = options.queue_capacity,
      .max_queued_tokens = options.max_queued_tokens > 0
                               ? options.max_queued_tokens
                               : kDefaultQueuedPrompts * engine_.info().max_tokens};
  scheduler_ = std::make_unique<Scheduler>(engine_,
                                           PassResources{.packer = *packer_,
                                                         .metrics = *metrics_,
                                                         .progress = progress_,
                                                         .clock = clock_,
                                                         .timeouts = timeouts_},
                                           wake_, limits);
  compute_thread_ = std::make_unique<ComputeThread>(*scheduler_, wake_);
}

absl::Status PrefillServer::CreateService(const ServerOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(auto push_credentials, MakePushCredentials(options.tls));
  const model::EngineInfo& engine = engine_.info();
  const model::AttentionOptions attention = Apply(options.attention, engine.default_attention);
  RequestLimits limits{.engine = &engine,
                       .default_attention = attention,
                       .allowed_policies = options.allowed_policies,
                       .recall_audit = options.recall_audit,
                       .deliver_to_allow = options.deliver_to_allow,
                       .max_lanes = options.max_lanes};
  push_dialer_ = std::make_unique<PushDialer>(std::move(push_credentials), clock_);
  service_ = std::make_unique<PrefillService>(*scheduler_, *push_dialer_, *metrics_, clock_,
                                              std::move(limits),
                                              DescribeServer(options, engine, attention));
  return absl::OkStatus();
}

absl::Status PrefillServer::StartListening(const ServerOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(const auto credentials, MakeServerCredentials(options.tls));
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetTransportLimits(options, engine_.info().max_tokens, builder);
  builder.AddListeningPort(options.listen, credentials, &port_);
  builder.RegisterService(service_.get());
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port_ == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--listen=", options.listen,
                     " cannot be served: the address is taken or not ours, or the TLS files are "
                     "not a matching certificate and key"));
  }
  health_ = std::make_unique<Health>(server_->GetHealthCheckService());
  return absl::OkStatus();
}

absl::Status PrefillServer::StartMetrics(const ServerOptions& options) {
  if (options.metrics_listen.empty()) return absl::OkStatus();
  PREFILLD_ASSIGN_OR_RETURN(metrics_endpoint_,
                            MetricsEndpoint::Create(options.metrics_listen, metrics_->registry()));
  return absl::OkStatus();
}

void PrefillServer::StartWatchdog(const ServerOptions& options) {
  watchdog_ = std::make_unique<Watchdog>(Watchdog::Watched{.engine = &engine_,
                                                           .ring = ring_.get(),
                                                           .progress = &progress_,
                                                           .scheduler = scheduler_.get(),
                                                           .health = health_.get(),
                                                           .metrics = metrics_.get()},
                                         clock_, timeouts_, options.wedge_timeout);
  watchdog_->Start();
}

bool PrefillServer::Drain(absl::Duration timeout) {
  health_->SetReady(false);
  scheduler_->Close("the server is draining");
  return scheduler_->AwaitIdle(timeout);
}

PrefillServer::~PrefillServer() {
  if (scheduler_ != nullptr) {
    scheduler_->Close("the server is shutting down");
    scheduler_->AbortAll(Outcome::kShutDown, absl::UnavailableError("the server is shutting down"));
    scheduler_->AwaitIdle(kShutdownTime);
  }
  if (server_ != nullptr) {
    server_->Shutdown(absl::ToChronoTime(absl::Now() + kShutdownTime));
    server_->Wait();
  }
  if (push_dialer_ != nullptr) push_dialer_->AwaitIdle();
  watchdog_.reset();
  // The transport may hold on to the last frames for a moment. Rather leak the memory than take
  // it from under a socket.
  if (ring_ != nullptr && !ring_->AwaitIdle(kShutdownTime)) {
    LogEvent(LogLevel::kError, "staging_not_returned", {{"staged_bytes", ring_->staged_bytes()}});
    (void)ring_.release();
  }
}

}  // namespace prefilld::server
