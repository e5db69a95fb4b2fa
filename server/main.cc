// prefilld: the disaggregated prefill server.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/checkpoint/ignored.h"
#include "model/prefill/prefill_engine.h"
#include "model/prefill/prefix_key.h"
#include "proto/process/file_watch.h"
#include "proto/process/log.h"
#include "proto/process/open_files.h"
#include "proto/process/openmp_waiting.h"
#include "proto/process/signals.h"
#include "proto/wire/bench_peer.h"
#include "proto/wire/host_port.h"
#include "proto/wire/port_file.h"
#include "server/clock.h"
#include "server/options.h"
#include "server/server.h"
#include "server/synthetic_engine.h"
#include "server/version.h"

namespace prefilld::server {
namespace {

using process::LogEvent;
using process::LogFields;
using process::LogLevel;

// The longest made-up prompt; more than is needed to measure.
constexpr int64_t kKvBenchTokens = int64_t{1} << 18;

absl::StatusOr<std::unique_ptr<model::PrefillEngine>> LoadModel(const process::EndSignals& signals,
                                                                const ServerOptions& options) {
  const process::ExitOnSignal exit_on_signal(signals, [](int) {
    LogEvent(LogLevel::kInfo, "ended", {{"while", "loading the model"}});
  });
  if (!options.kv_bench_listen.empty()) {
    return SyntheticEngine::Create(std::max(options.engine.max_tokens, kKvBenchTokens));
  }
  return model::CreatePrefillEngine(options.engine);
}

int Refuse(const char* step, const absl::Status& status) {
  LogEvent(LogLevel::kError, "start_failed",
           {{"step", step}, {"status", std::string(status.message())}});
  return EXIT_FAILURE;
}

// Says what the cluster file promises, and for which prompts.
void LogCalibratedLoss(const model::EngineInfo& engine) {
  if (!engine.calibrated_loss.has_value()) return;
  const model::CalibratedLoss& loss = *engine.calibrated_loss;
  LogFields fields = {{"promised_perplexity_rise", loss.max_perplexity_rise},
                      {"measured_perplexity_rise", loss.perplexity_rise},
                      {"standard_error", loss.standard_error},
                      {"worst_prompt", loss.worst_prompt},
                      {"density", loss.density},
                      {"prompts", loss.prompts},
                      {"shortest_tokens", loss.shortest_tokens},
                      {"longest_tokens", loss.longest_tokens},
                      {"holds_up_to_tokens", loss.max_tokens()}};
  if (engine.max_tokens > loss.max_tokens()) {
    fields.emplace_back("longer_prompts", "built-in thresholds, no head shares");
  }
  LogEvent(LogLevel::kInfo, "calibrated_loss", fields);
}

void LogConfiguration(const ServerOptions& options, const model::EngineInfo& engine) {
  LogFields fields = {{"version", kVersion}};
  for (const auto& [flag, value] : Describe(options)) fields.emplace_back(flag, value);
  LogEvent(LogLevel::kInfo, "configuration", fields);

  fields.clear();
  for (const auto& [what, names] : DescribeIgnored(engine.config, engine.unused_tensors)) {
    fields.emplace_back(what, names);
  }
  if (!fields.empty()) LogEvent(LogLevel::kInfo, "checkpoint_ignored", fields);

  const model::AttentionOptions attention = Apply(options.attention, engine.default_attention);
  fields = {{"name", engine.model_name},
            {"fingerprint", engine.fingerprint},
            {"device", engine.device_name},
            {"layers", static_cast<int64_t>(engine.config.num_layers)},
            {"max_prompt_tokens", engine.max_tokens},
            {"policy", model::Name(attention.policy)}};
  for (const model::AttentionThreshold& threshold : model::kAttentionThresholds) {
    if ((threshold.setters & model::kOperator) == 0) continue;
    std::visit([&](auto value) { fields.emplace_back(threshold.name, value); },
               model::ValueOf(threshold, attention));
  }
  LogEvent(LogLevel::kInfo, "model", fields);
  LogCalibratedLoss(engine);
}

// Says what was reserved at the start; deploy/guide/README.md has the formulas.
void LogMemory(const ServerOptions& options, const model::PrefillEngine& engine) {
  const int64_t cached_block_bytes = engine.prefix_cache().block_bytes;
  const int64_t cached_blocks =
      cached_block_bytes > 0 ? options.engine.prefix_cache_bytes / cached_block_bytes : 0;
  LogEvent(LogLevel::kInfo, "memory",
           {{"device_bytes", static_cast<int64_t>(engine.allocated_bytes())},
            {"resident_tokens", engine.resident_tokens().limit},
            {"staging_bytes", options.staging_bytes},
            {"prefix_cache_bytes", cached_blocks * cached_block_bytes},
            {"prefix_cache_tokens", cached_blocks * model::kPrefixBlockTokens}});
}

// Returns the addresses with the port that the first one of TCP was given.
std::string WithPort(const std::string& listen, int port) {
  std::vector<std::string> addresses = wire::SplitAddresses(listen);
  for (std::string& address : addresses) {
    if (!wire::ParseHostPort(address).has_value()) continue;
    address = absl::StrCat(address.substr(0, address.rfind(':')), ":", port);
    break;
  }
  return absl::StrJoin(addresses, ",");
}

void LogReady(const ServerOptions& options, const PrefillServer& server) {
  LogFields fields = {{"listen", WithPort(options.listen, server.port())}};
  if (server.metrics_port() != 0) {
    const std::string address = WithPort(options.metrics_listen, server.metrics_port());
    fields.emplace_back("metrics", absl::StrCat("http://", address, "/metrics"));
  }
  LogEvent(LogLevel::kInfo, "ready", fields);
}

// Null where no KV is made up.
absl::StatusOr<std::unique_ptr<wire::BenchPeer>> ListenForBench(const ServerOptions& options) {
  if (options.kv_bench_listen.empty()) return nullptr;
  return wire::BenchPeer::Listen(options.kv_bench_listen);
}

int Serve(const process::EndSignals& signals, const ServerOptions& options) {
  auto engine = LoadModel(signals, options);
  if (!engine.ok()) return Refuse("load_model", engine.status());
  LogConfiguration(options, (*engine)->info());
  LogMemory(options, **engine);

  auto server = PrefillServer::Create(options, **engine, Clock::Real());
  if (!server.ok()) return Refuse("listen", server.status());
  const auto bench_peer = ListenForBench(options);
  if (!bench_peer.ok()) return Refuse("kv_bench_listen", bench_peer.status());
  if (absl::Status written = wire::WritePortFile(
          options.port_file, {.grpc = (*server)->port(),
                              .metrics = (*server)->metrics_port(),
                              .kv_bench = *bench_peer == nullptr ? 0 : (*bench_peer)->port()});
      !written.ok()) {
    return Refuse("port_file", written);
  }
  LogReady(options, **server);

  const int signal = signals.Await([&server] { return !(*server)->failure().ok(); },
                                   [&server] { (*server)->ReloadFiles(); });
  if (signal == 0) {
    LogEvent(LogLevel::kError, "device_failed", {{"status", (*server)->failure().ToString()}});
    // Every request has been ended. An alert needs to see why the process goes.
    (*server)->AwaitScrape(options.drain_timeout);
  } else {
    LogEvent(LogLevel::kInfo, "draining",
             {{"signal", process::SignalName(signal)},
              {"drain_timeout_s", absl::ToDoubleSeconds(options.drain_timeout)}});
  }
  const bool drained = (*server)->Drain(options.drain_timeout);
  const int code = (*server)->failure().ok() ? EXIT_SUCCESS : EXIT_FAILURE;
  const bool files_hang = !(*server)->StopWatchingFiles(process::FileWatch::kEndPatience);
  if (!files_hang) server->reset();
  LogEvent(LogLevel::kInfo, "ended",
           {{"drained", drained ? "yes" : "no"}, {"files_hang", files_hang ? "yes" : "no"}});
  if (files_hang) process::ExitAtOnce(code);
  return code;
}

int Main(int argc, char** argv) {
  const absl::Status waiting = process::LetOpenMpThreadsSleep(argv);
  const auto options = OptionsFromCommandLine(argc, argv);
  const process::EndSignals signals;  // before the log's thread
  process::InitLogging(options.ok() ? options->log_format : process::LogFormat::kText);
  if (!options.ok()) return Refuse("options", options.status());
  if (!waiting.ok()) {
    LogEvent(LogLevel::kWarning, "openmp_threads_spin",
             {{"status", std::string(waiting.message())}});
  }
  process::RaiseOpenFilesLimit();
  return Serve(signals, *options);
}

}  // namespace
}  // namespace prefilld::server

int main(int argc, char** argv) { return prefilld::server::Main(argc, argv); }
