#include "client/decode_worker/worker_server.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "client/decode_worker/generate_service.h"
#include "client/decode_worker/receiver_service.h"
#include "client/pem_file.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"

namespace prefilld::client {
namespace {

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

}  // namespace

int MaxMessageBytes(const WorkerOptions& options, const model::ModelConfig& model) {
  // prefilld fills frames of 4 MiB at most, or of its largest block, whatever the blocks asked for.
  constexpr int64_t kFrameBytes = int64_t{4} << 20;
  constexpr int64_t kMaxBlockTokens = 128;
  constexpr int64_t kTokenBytes = 5;  // an id as varint
  constexpr int64_t kOtherFields = int64_t{1} << 20;
  const int64_t block_bytes = 2 * kMaxBlockTokens * model.num_kv_heads * model.head_dim *
                              static_cast<int64_t>(sizeof(float));
  const int64_t payload =
      std::max({kFrameBytes, block_bytes, 2 * kTokenBytes * options.decoder.pool_tokens});
  return static_cast<int>(
      std::min<int64_t>(payload + kOtherFields, std::numeric_limits<int32_t>::max()));
}

// A Generate and a Receive for every request that can run, probes, and as many refused ones.
int MaxStreamsPerConnection(const WorkerOptions& options) { return 2 * options.max_requests + 64; }

absl::StatusOr<std::unique_ptr<grpc::Server>> StartWorkerServer(const WorkerOptions& options,
                                                                const model::ModelConfig& model,
                                                                GenerateService& generate,
                                                                ReceiverService& receiver,
                                                                int& port) {
  const auto credentials = MakeCredentials(options.tls);
  if (!credentials.ok()) return credentials.status();
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.listen, *credentials, &port);
  builder.SetMaxReceiveMessageSize(MaxMessageBytes(options, model));
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, MaxStreamsPerConnection(options));
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

}  // namespace prefilld::client
