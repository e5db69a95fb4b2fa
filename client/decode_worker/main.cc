// prefilld-decode-worker takes prompts, has them prefilled by prefilld, and decodes over the cache
// that comes back.
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "client/decode_worker/decode_loop.h"
#include "client/decode_worker/generate_service.h"
#include "client/decode_worker/kv_block_pool.h"
#include "client/decode_worker/metrics.h"
#include "client/decode_worker/options.h"
#include "client/decode_worker/pending_transfers.h"
#include "client/decode_worker/receiver_service.h"
#include "client/decode_worker/worker_server.h"
#include "client/prefill_client.h"
#include "grpcpp/server.h"
#include "model/checkpoint/ignored.h"
#include "model/decode/decoder.h"
#include "proto/process/certificate_watch.h"
#include "proto/process/file_watch.h"
#include "proto/process/health.h"
#include "proto/process/kept_memory.h"
#include "proto/process/log.h"
#include "proto/process/open_files.h"
#include "proto/process/openmp_waiting.h"
#include "proto/process/port_watch.h"
#include "proto/process/signals.h"
#include "proto/status_macros.h"
#include "proto/wire/arrivals.h"
#include "proto/wire/port_file.h"

namespace prefilld::client {
namespace {

using process::LogEvent;
using process::LogLevel;

absl::StatusOr<std::unique_ptr<model::Decoder>> LoadModel(const process::EndSignals& signals,
                                                          const WorkerOptions& options) {
  const process::ExitOnSignal exit_on_signal(signals, [](int signal) {
    LogEvent(LogLevel::kInfo, "ended",
             {{"signal", process::SignalName(signal)}, {"while", "loading the model"}});
  });
  return model::Decoder::Create(options.decoder);
}

void LogConfiguration(const WorkerOptions& options) {
  process::LogFields fields;
  for (const auto& [flag, value] : Describe(options)) fields.emplace_back(flag, value);
  LogEvent(LogLevel::kInfo, "configuration", fields);
}

absl::StatusOr<std::unique_ptr<PrefillClient>> ConnectToPrefill(const WorkerOptions& options) {
  if (options.prefill_addresses.empty()) return nullptr;
  return PrefillClient::Create(options.prefill, options.prefill_addresses);
}

void LogIgnored(const model::Decoder& decoder) {
  process::LogFields fields;
  for (const auto& [what, names] : DescribeIgnored(decoder.config(), decoder.unused_tensors())) {
    fields.emplace_back(what, names);
  }
  if (!fields.empty()) LogEvent(LogLevel::kInfo, "checkpoint_ignored", fields);
}

void LogReady(const wire::Ports& ports, const model::Decoder& decoder, const KvBlockPool& pool) {
  LogEvent(LogLevel::kInfo, "ready",
           {{"grpc_port", int64_t{ports.grpc}},
            {"metrics_port", int64_t{ports.metrics}},
            {"device", decoder.device_name()},
            {"fingerprint", decoder.fingerprint()},
            {"kv_blocks", pool.num_blocks()}});
}

void DrainAndStop(wire::Listener& listener, process::Health& health, GenerateService& generate,
                  process::FileWatch& files, absl::Duration timeout) {
  health.SetReady(false);
  const bool drained = generate.Drain(timeout);
  listener.Shutdown(absl::ZeroDuration());
  const bool files_hang = !files.Stop(process::FileWatch::kEndPatience);
  LogEvent(LogLevel::kInfo, "ended",
           {{"drained", drained ? "yes" : "no"}, {"files_hang", files_hang ? "yes" : "no"}});
  if (files_hang) process::ExitAtOnce(EXIT_SUCCESS);
}

absl::Status Serve(const process::EndSignals& signals, const WorkerOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(const auto decoder, LoadModel(signals, options));
  LogIgnored(*decoder);
  PREFILLD_ASSIGN_OR_RETURN(const auto prefill, ConnectToPrefill(options));
  KvBlockPool pool(decoder->num_pool_blocks());
  WorkerMetrics metrics;
  metrics.WatchPool(pool.num_blocks(), [&pool] { return pool.free_blocks(); });
  DecodeLoop loop(decoder.get());
  PendingTransfers transfers;
  wire::Arrivals arrivals(wire::Arrivals::LimitFor(options.stall_timeout));
  GenerateService generate({.options = &options,
                            .decoder = decoder.get(),
                            .pool = &pool,
                            .loop = &loop,
                            .prefill = prefill.get(),
                            .transfers = &transfers,
                            .metrics = &metrics},
                           arrivals);
  ReceiverService receiver({.transfers = &transfers,
                            .open_timeout = options.stall_timeout,
                            .metrics = &metrics,
                            .arrivals = &arrivals});

  wire::Ports ports;
  PREFILLD_ASSIGN_OR_RETURN(const auto listener, StartWorkerServer(options, decoder->config(),
                                                                   generate, receiver, arrivals));
  process::CertificateWatch watch(listener->certificates(), options.prefill_addresses.empty()
                                                                ? std::nullopt
                                                                : options.prefill.tls);
  process::FileWatch files(watch.Subjects());
  process::Health health(listener->server().GetHealthCheckService(),
                         {::prefill::v1::DecodeService::service_full_name(),
                          ::prefill::v1::KvReceiver::service_full_name()});
  PREFILLD_ASSIGN_OR_RETURN(
      ports.metrics, metrics.Serve(options.metrics_listen, watch.metrics(), health.live_flag()));
  ports.grpc = listener->port();
  const process::PortWatch port_watch(listener->connections(), &arrivals, health,
                                      metrics.registry(), process::PortWatch::Timing());
  health.SetReady(true);
  PREFILLD_RETURN_IF_ERROR(wire::WritePortFile(options.port_file, ports));
  LogReady(ports, *decoder, pool);

  const int signal = signals.Await([] { return false; }, [&files] { files.ReloadNow(); });
  LogEvent(LogLevel::kInfo, "draining", {{"signal", process::SignalName(signal)}});
  DrainAndStop(*listener, health, generate, files, options.drain_timeout);
  return absl::OkStatus();
}

absl::Status Run(int argc, char** argv) {
  const absl::Status waiting = process::LetOpenMpThreadsSleep(argv);
  process::KeepFreedMemory();
  const auto options = OptionsFromCommandLine(argc, argv);
  const process::EndSignals signals;  // before the log's thread
  process::InitLogging(options.ok() ? options->log_format : process::LogFormat::kText);
  PREFILLD_RETURN_IF_ERROR(options.status());
  if (!waiting.ok()) {
    LogEvent(LogLevel::kWarning, "openmp_threads_spin",
             {{"status", std::string(waiting.message())}});
  }
  process::RaiseOpenFilesLimit();
  LogConfiguration(*options);
  return Serve(signals, *options);
}

}  // namespace
}  // namespace prefilld::client

int main(int argc, char** argv) {
  const absl::Status status = prefilld::client::Run(argc, argv);
  if (status.ok()) return 0;
  prefilld::process::LogEvent(prefilld::process::LogLevel::kError, "start_failed",
                              {{"status", std::string(status.message())}});
  return absl::IsInvalidArgument(status) ? 2 : 1;
}
