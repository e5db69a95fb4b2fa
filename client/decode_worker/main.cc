// prefilld-decode-worker: takes prompts, has them prefilled by prefilld, decodes over the cache
// that comes back.
#include <csignal>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>

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
#include "client/pem_file.h"
#include "client/prefill_client.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "model/decoder.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace prefilld::client {
namespace {

// A prompt of a million token ids is about 5 MiB; frames are up to 64 MiB.
constexpr int kMaxMessageBytes = 64 << 20;

// A caller or a pushing server that vanished without a word is noticed within half a minute, and
// clients may ping every 10 s.
constexpr int kKeepaliveMs = 20'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
constexpr int kMinClientPingMs = 5'000;

void SetKeepalive(grpc::ServerBuilder& builder) {
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinClientPingMs);
}

// Threads started later inherit the mask, so that only WaitForSignal sees the signals.
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

void LogOptions(const WorkerOptions& options) {
  std::string text;
  for (const auto& [flag, value] : Describe(options)) absl::StrAppend(&text, " ", flag, "=", value);
  spdlog::info("options{}", text);
}

absl::StatusOr<std::unique_ptr<PrefillClient>> ConnectToPrefill(const ChannelOptions& options) {
  if (options.address.empty()) return nullptr;
  return PrefillClient::Create(options);
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(const ListenTls& tls) {
  if (tls.cert_file.empty()) return grpc::InsecureServerCredentials();
  const auto cert = ReadPemFile("--tls_cert", tls.cert_file);
  if (!cert.ok()) return cert.status();
  const auto key = ReadPemFile("--tls_key", tls.key_file);
  if (!key.ok()) return key.status();
  const auto client_ca = ReadPemFile("--tls_client_ca", tls.client_ca_file);
  if (!client_ca.ok()) return client_ca.status();
  grpc::SslServerCredentialsOptions ssl(
      client_ca->empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                         : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  ssl.pem_root_certs = *client_ca;
  ssl.pem_key_cert_pairs.push_back({*key, *cert});
  return grpc::SslServerCredentials(ssl);
}

absl::StatusOr<std::unique_ptr<grpc::Server>> StartServer(const WorkerOptions& options,
                                                          GenerateService& generate,
                                                          ReceiverService& receiver, int& port) {
  const auto credentials = MakeCredentials(options.tls);
  if (!credentials.ok()) return credentials.status();
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.listen, *credentials, &port);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  SetKeepalive(builder);
  // Two workers on one port would share its connections at random.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.RegisterService(&generate);
  builder.RegisterService(&receiver);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    return absl::UnavailableError(absl::StrCat("--listen=", options.listen, " cannot be bound"));
  }
  return server;
}

// Appears complete or not at all.
absl::Status WritePortFile(const std::string& path, int grpc_port, int metrics_port) {
  const std::string unfinished = path + ".tmp";
  std::ofstream file(unfinished);
  file << "grpc=" << grpc_port << "\n";
  if (metrics_port > 0) file << "metrics=" << metrics_port << "\n";
  file.close();
  if (!file || std::rename(unfinished.c_str(), path.c_str()) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("--port_file=", path, " cannot be written"));
  }
  return absl::OkStatus();
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

  const auto decoder = model::Decoder::Create(options->decoder);
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
  ReceiverService receiver(&transfers);

  absl::StatusOr<int> metrics_port = 0;
  if (!options->metrics_listen.empty()) metrics_port = metrics.Serve(options->metrics_listen);
  if (!metrics_port.ok()) return metrics_port.status();
  int port = 0;
  const auto server = StartServer(*options, generate, receiver, port);
  if (!server.ok()) return server.status();
  if (!options->port_file.empty()) {
    const absl::Status written = WritePortFile(options->port_file, port, *metrics_port);
    if (!written.ok()) return written;
  }
  spdlog::info("ready grpc_port={} metrics_port={} device={} fingerprint={} kv_blocks={}", port,
               *metrics_port, (*decoder)->device_name(), (*decoder)->fingerprint(),
               pool.num_blocks());

  int signal = 0;
  sigwait(&signals, &signal);
  spdlog::info("signal {}: draining", signal);
  DrainAndStop(**server, generate, options->drain_timeout);
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
