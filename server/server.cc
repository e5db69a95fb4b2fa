#include "server/server.h"

#include <algorithm>
#include <limits>
#include <thread>
#include <utility>

#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server.h>
#include <prometheus/registry.h>

#include "absl/strings/str_cat.h"
#include "proto/process/certificate_watch.h"
#include "proto/process/file_watch.h"
#include "proto/process/health.h"
#include "proto/process/log.h"
#include "proto/process/metrics_endpoint.h"
#include "proto/process/port_watch.h"
#include "proto/process/process_metrics.h"
#include "proto/status_macros.h"
#include "proto/wire/arrivals.h"
#include "proto/wire/grpc_status.h"
#include "proto/wire/kv_layout.h"
#include "proto/wire/listener.h"
#include "proto/wire/tls.h"
#include "server/cache_watch.h"
#include "server/prefill_service.h"
#include "server/push_dialer.h"
#include "server/resumption_service.h"
#include "server/shared_memory_host.h"
#include "server/tenant_directory.h"
#include "server/version.h"
#include "server/watchdog.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

// The time that calls have to unwind when the server is destroyed.
constexpr absl::Duration kShutdownTime = absl::Seconds(5);

// Requests somewhat above the limit are still read, so that the caller is told the limit.
int64_t MaxRequestBytes(int64_t max_prompt_tokens) {
  constexpr int64_t kVarintBytes = 5;
  constexpr int64_t kOtherFields = int64_t{1} << 20;
  return 2 * kVarintBytes * max_prompt_tokens + kOtherFields;
}

// Allows every request that can be live, probes, and as much again.
int64_t MaxStreams(const ServerOptions& options) {
  return 2 * (options.queue_capacity + options.max_lanes) + 64;
}

// For pushes the server presents its own certificate. Receivers are trusted by the certificates
// that sign clients, or by the system's where there are none.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakePushCredentials(
    const wire::ServerTls& tls) {
  if (tls.cert_file.empty()) return wire::MakeChannelCredentials(std::nullopt);
  return wire::MakeChannelCredentials(wire::ChannelTls{.ca_file = tls.client_ca_file,
                                                       .cert_file = tls.cert_file,
                                                       .key_file = tls.key_file,
                                                       .server_name = ""});
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
  info.set_crossover_tokens(static_cast<uint32_t>(
      std::min<int64_t>(attention.crossover_tokens, std::numeric_limits<uint32_t>::max())));
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
  std::unique_ptr<PrefillServer> server(new PrefillServer(engine, clock));
  server->timeouts_.stall = options.stall_timeout;
  server->timeouts_.min_consumer_bytes_per_s = options.min_consumer_mb_per_s * 1e6;
  server->metrics_ = std::make_unique<Metrics>(engine.info(), options.tenants.all());
  PREFILLD_RETURN_IF_ERROR(server->CreateStaging(options));
  server->CreateScheduler(options);
  PREFILLD_RETURN_IF_ERROR(server->CreateSharedMemory(options));
  PREFILLD_RETURN_IF_ERROR(server->CreateService(options));
  PREFILLD_RETURN_IF_ERROR(server->StartListening(options));
  PREFILLD_RETURN_IF_ERROR(server->StartMetrics(options));
  server->StartWatchdog(options);
  server->health_->SetReady(true);
  return server;
}

// A buffer must hold at least one block of the widest layout, whatever the flag says.
absl::Status PrefillServer::CreateStaging(const ServerOptions& options) {
  const model::ModelConfig& config = engine_.info().config;
  const int64_t buffer_bytes =
      std::max(options.frame_bytes, wire::MaxKvPairBytes(config.num_kv_heads, config.head_dim));
  const int64_t num_buffers = std::max<int64_t>(options.staging_bytes / buffer_bytes, 4);
  auto ring = StagingRing::Create(engine_, static_cast<int>(num_buffers), buffer_bytes);
  if (!ring.ok()) {
    return wire::WithPrefix(absl::StrCat("--staging_bytes=", options.staging_bytes, ": "),
                            ring.status());
  }
  ring_ = *std::move(ring);
  return absl::OkStatus();
}

void PrefillServer::CreateScheduler(const ServerOptions& options) {
  const int threads = PackThreads(options, static_cast<int>(std::thread::hardware_concurrency()));
  packer_ = std::make_unique<KvPacker>(
      KvPacker::Surroundings{
          .ring = *ring_, .metrics = *metrics_, .progress = progress_, .wake = wake_},
      engine_.kv_slots(), threads);
  constexpr int64_t kDefaultQueuedPrompts = 8;
  const absl::Span<const Tenant> tenants = options.tenants.all();
  const QueueLimits limits{
      .capacity = options.queue_capacity,
      .max_queued_tokens = options.max_queued_tokens > 0
                               ? options.max_queued_tokens
                               : kDefaultQueuedPrompts * engine_.info().max_tokens,
      .tenants = {tenants.begin(), tenants.end()}};
  metrics_->SetLimits(limits.max_queued_tokens, options.drain_timeout);
  scheduler_ = std::make_unique<Scheduler>(engine_,
                                           PassResources{.packer = *packer_,
                                                         .metrics = *metrics_,
                                                         .progress = progress_,
                                                         .clock = clock_,
                                                         .timeouts = timeouts_},
                                           wake_, limits, options.scheduling);
  compute_thread_ = std::make_unique<ComputeThread>(*scheduler_, wake_);
}

absl::Status PrefillServer::CreateSharedMemory(const ServerOptions& options) {
  metrics_->shared_memory().SetLimit(options.shared_memory_bytes);
  if (options.shared_memory_bytes == 0) return absl::OkStatus();
  auto host = SharedMemoryHost::Create(
      {.max_bytes = options.shared_memory_bytes,
       .max_attachments = options.max_shared_memories,
       .folder = options.shared_memory_dir,
       .max_lanes = options.max_lanes,
       .is_shared_by_tenants = options.tenant_evidence.source != TenantSource::kNone},
      {.engine = engine_,
       .ring = *ring_,
       .scheduler = *scheduler_,
       .metrics = metrics_->shared_memory()});
  if (!host.ok()) {
    return wire::WithPrefix(absl::StrCat("--shared_memory_dir=", options.shared_memory_dir, ": "),
                            host.status());
  }
  shared_memory_ = *std::move(host);
  return absl::OkStatus();
}

absl::Status PrefillServer::CreateService(const ServerOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(auto push_credentials, MakePushCredentials(options.tls));
  const model::EngineInfo& engine = engine_.info();
  const model::AttentionOptions attention = Apply(options.attention, engine.default_attention);
  RequestLimits limits;
  limits.engine = &engine;
  limits.attention.defaults = attention;
  limits.attention.beyond_calibration =
      Apply(options.attention, engine.attention_beyond_calibration);
  if (engine.calibrated_loss.has_value()) {
    limits.attention.calibrated_tokens = engine.calibrated_loss->max_tokens();
  }
  limits.attention.allowed_policies = options.allowed_policies;
  limits.attention.recall_audit = options.recall_audit;
  limits.deliver_to_allow = options.deliver_to_allow;
  limits.max_lanes = options.max_lanes;
  limits.resume_window = options.resume_window;
  if (shared_memory_ != nullptr) limits.shared_memory = shared_memory_->terms();
  push_dialer_ =
      std::make_unique<PushDialer>(std::move(push_credentials), options.use_proxy, clock_,
                                   options.stall_timeout, metrics_->resumption());
  arrivals_ = std::make_unique<wire::Arrivals>(wire::Arrivals::LimitFor(options.stall_timeout));
  cache_watch_ = std::make_unique<CacheWatch>(engine_.prefix_index(), options.cache_watch,
                                              engine.fingerprint, *metrics_->registry());
  tenants_ = std::make_unique<TenantDirectory>(
      options.tenants_file, StrangersOf(options.tenant_evidence.source), options.tenants,
      [options](const Tenants& table) { return CheckTenants(options, table); },
      [this](const Tenants& table) {
        metrics_->tenants().SetTenants(table.all());
        scheduler_->SetTenants(table.all());
      },
      [this] { cache_watch_->CheckCallers(); }, *metrics_->registry());
  service_ = std::make_unique<PrefillService>(
      *scheduler_, *push_dialer_, *metrics_, clock_, std::move(limits), options.tenant_evidence,
      *tenants_, *cache_watch_, *arrivals_, DescribeServer(options, engine, attention), *ring_);
  resumption_service_ = std::make_unique<ResumptionService>(*scheduler_, *metrics_, *arrivals_);
  return absl::OkStatus();
}

absl::Status PrefillServer::StartListening(const ServerOptions& options) {
  const wire::ListenOptions listen = {
      .address = options.listen,
      .tls = options.tls,
      .max_request_bytes = MaxRequestBytes(engine_.info().max_tokens),
      .max_streams = MaxStreams(options),
      .max_connections = options.max_connections,
      .stall_timeout = options.stall_timeout,
      .arrivals = arrivals_.get()};
  PREFILLD_ASSIGN_OR_RETURN(
      listener_, wire::Listener::Create(listen, {service_.get(), resumption_service_.get()}));
  certificate_watch_ = std::make_unique<process::CertificateWatch>(listener_->certificates());
  std::vector<process::FileWatch::Subject> files = certificate_watch_->Subjects();
  for (auto& subject : tenants_->Subjects()) files.push_back(std::move(subject));
  file_watch_ = std::make_unique<process::FileWatch>(std::move(files));
  service_->SetConnections(&listener_->connections());
  resumption_service_->SetConnections(&listener_->connections());
  health_ = std::make_unique<process::Health>(
      listener_->server().GetHealthCheckService(),
      std::vector<std::string>{v1::PrefillService::service_full_name()});
  port_watch_ =
      std::make_unique<process::PortWatch>(listener_->connections(), arrivals_.get(), *health_,
                                           metrics_->registry(), process::PortWatch::Timing());
  return absl::OkStatus();
}

absl::Status PrefillServer::StartMetrics(const ServerOptions& options) {
  if (options.metrics_listen.empty()) return absl::OkStatus();
  PREFILLD_ASSIGN_OR_RETURN(
      metrics_endpoint_,
      process::MetricsEndpoint::Create(options.metrics_listen,
                                       {metrics_->registry(), process::LogMetrics(),
                                        process::ProcessMetrics(), certificate_watch_->metrics()},
                                       health_->live_flag()));
  return absl::OkStatus();
}

void PrefillServer::StartWatchdog(const ServerOptions& options) {
  watchdog_ = std::make_unique<Watchdog>(Watchdog::Watched{.engine = &engine_,
                                                           .ring = ring_.get(),
                                                           .progress = &progress_,
                                                           .scheduler = scheduler_.get(),
                                                           .health = health_.get(),
                                                           .metrics = metrics_.get(),
                                                           .service = service_.get(),
                                                           .cache_watch = cache_watch_.get()},
                                         clock_, timeouts_, options.wedge_timeout);
  watchdog_->Start();
}

int PrefillServer::port() const { return listener_->port(); }

int PrefillServer::metrics_port() const {
  return metrics_endpoint_ == nullptr ? 0 : metrics_endpoint_->port();
}

bool PrefillServer::ReloadFiles(absl::Duration patience) {
  return file_watch_->ReloadNow(patience);
}

bool PrefillServer::StopWatchingFiles(absl::Duration patience) {
  return file_watch_->Stop(patience);
}

void PrefillServer::AwaitScrape(absl::Duration timeout) {
  if (metrics_endpoint_ != nullptr) metrics_endpoint_->AwaitReader(timeout);
}

bool PrefillServer::Drain(absl::Duration timeout) {
  health_->SetReady(false);
  watchdog_->BeginDrain();
  scheduler_->Close("the server is draining");
  cache_watch_->Close("the server is draining");
  return scheduler_->AwaitIdle(timeout);
}

PrefillServer::~PrefillServer() {
  if (scheduler_ != nullptr) {
    scheduler_->Close("the server is shutting down");
    scheduler_->AbortAll(Outcome::kShutDown, absl::UnavailableError("the server is shutting down"));
    scheduler_->AwaitIdle(kShutdownTime);
  }
  if (cache_watch_ != nullptr) cache_watch_->Close("the server is shutting down");
  port_watch_.reset();
  if (listener_ != nullptr) listener_->Shutdown(kShutdownTime);
  if (push_dialer_ != nullptr) push_dialer_->AwaitIdle();
  watchdog_.reset();
  shared_memory_.reset();
  // The transport may hold on to the last frames for a moment. If it takes too long, the memory is
  // leaked rather than freed while a socket uses it.
  if (ring_ != nullptr && !ring_->AwaitIdle(kShutdownTime)) {
    process::LogEvent(process::LogLevel::kError, "staging_not_returned",
                      {{"staged_bytes", ring_->staged_bytes()}});
    (void)ring_.release();
  }
}

}  // namespace prefilld::server
