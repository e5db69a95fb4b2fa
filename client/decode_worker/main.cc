// prefilld-decode-worker: takes prompts, has them prefilled by prefilld, decodes over the cache
// that comes back.
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
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
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/server.h"
#include "model/decode/decoder.h"
#include "proto/status_macros.h"
#include "proto/wire/listener.h"
#include "proto/wire/port_file.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace prefilld::client {
namespace {

// Threads started later inherit the mask, so that one thread at a time takes the signals.
sigset_t BlockTerminationSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // Writing to a connection or a log whose reader is gone is an error code, not our end.
  std::signal(SIGPIPE, SIG_IGN);
  return signals;
}

// While it lives a signal ends the process at once: a model that loads can be neither broken off
// nor drained.
class ExitOnSignalWhileLoading {
 public:
  explicit ExitOnSignalWhileLoading(const sigset_t& signals)
      : thread_([this, signals] { Run(signals); }) {}
  ~ExitOnSignalWhileLoading() {
    loaded_ = true;
    thread_.join();
  }

 private:
  void Run(const sigset_t& signals) {
    constexpr timespec kPoll = {.tv_sec = 0, .tv_nsec = 20'000'000};
    while (!loaded_) {
      const int signal = sigtimedwait(&signals, nullptr, &kPoll);
      if (signal <= 0) continue;
      spdlog::info("signal {} while loading the model", signal);
      _exit(EXIT_SUCCESS);
    }
  }

  std::atomic<bool> loaded_ = false;
  std::thread thread_;
};

absl::StatusOr<std::unique_ptr<model::Decoder>> LoadModel(const sigset_t& signals,
                                                          const WorkerOptions& options) {
  const ExitOnSignalWhileLoading exit_on_signal(signals);
  return model::Decoder::Create(options.decoder);
}

void LogOptions(const WorkerOptions& options) {
  std::string text;
  for (const auto& [flag, value] : Describe(options)) absl::StrAppend(&text, " ", flag, "=", value);
  spdlog::info("options{}", text);
}

absl::StatusOr<std::unique_ptr<PrefillClient>> ConnectToPrefill(const ChannelOptions& options) {
  if (options.address.empty()) return nullptr;
  return PrefillClient::Create(options);
}

// The second signal does not wait for anything.
void ExitOnNextSignal(const sigset_t& signals) {
  std::signal(SIGTERM, [](int) { _exit(EXIT_FAILURE); });
  std::signal(SIGINT, [](int) { _exit(EXIT_FAILURE); });
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
}

void DrainAndStop(grpc::Server& server, GenerateService& generate, absl::Duration timeout) {
  server.GetHealthCheckService()->SetServingStatus(false);
  const bool finished = generate.Drain(timeout);
  spdlog::info("drained: {}", finished ? "all requests finished" : "cancelling the rest");
  server.Shutdown(absl::ToChronoTime(absl::Now()));
}

absl::Status Run(int argc, char** argv) {
  const sigset_t signals = BlockTerminationSignals();
  spdlog::set_default_logger(spdlog::stderr_logger_mt("decode-worker"));
  const absl::StatusOr<WorkerOptions> options = OptionsFromCommandLine(argc, argv);
  if (!options.ok()) return options.status();
  LogOptions(*options);

  const auto decoder = LoadModel(signals, *options);
  if (!decoder.ok()) return decoder.status();
  const auto prefill = ConnectToPrefill(options->prefill);
  if (!prefill.ok()) return prefill.status();
  KvBlockPool pool((*decoder)->num_pool_blocks());
  WorkerMetrics metrics;
  metrics.WatchPool(pool.num_blocks(), [&pool] { return pool.free_blocks(); });
  DecodeLoop loop(decoder->get());
  PendingTransfers transfers;
  GenerateService generate({.options = &*options,
                            .decoder = decoder->get(),
                            .pool = &pool,
                            .loop = &loop,
                            .prefill = prefill->get(),
                            .transfers = &transfers,
                            .metrics = &metrics});
  ReceiverService receiver(&transfers, options->stall_timeout);

  absl::StatusOr<int> metrics_port = 0;
  if (!options->metrics_listen.empty()) metrics_port = metrics.Serve(options->metrics_listen);
  if (!metrics_port.ok()) return metrics_port.status();
  PREFILLD_ASSIGN_OR_RETURN(const wire::Listener listener,
                            StartWorkerServer(*options, (*decoder)->config(), generate, receiver));
  PREFILLD_RETURN_IF_ERROR(
      wire::WritePortFile(options->port_file, {.grpc = listener.port, .metrics = *metrics_port}));
  spdlog::info("ready grpc_port={} metrics_port={} device={} fingerprint={} kv_blocks={}",
               listener.port, *metrics_port, (*decoder)->device_name(), (*decoder)->fingerprint(),
               pool.num_blocks());

  int signal = 0;
  sigwait(&signals, &signal);
  ExitOnNextSignal(signals);
  spdlog::info("signal {}: draining", signal);
  DrainAndStop(*listener.server, generate, options->drain_timeout);
  return absl::OkStatus();
}

}  // namespace
}  // namespace prefilld::client

int main(int argc, char** argv) {
  const absl::Status status = prefilld::client::Run(argc, argv);
  if (status.ok()) return 0;
  std::fprintf(stderr, "prefilld-decode-worker: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? 2 : 1;
}
