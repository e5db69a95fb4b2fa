// kv-stream-bench measures how fast a KV cache travels from a prefilld to a consumer on loopback,
// framed, checksummed at both ends and verified, beside bare TCP.
//
//   kv-stream-bench [--tokens=16384] [--lanes=1,2,4] [--frame_bytes=2097152] [--runs=3]
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/prefill_client.h"
#include "proto/process/command_line.h"
#include "server/clock.h"
#include "server/server.h"
#include "spdlog/spdlog.h"
#include "tests/bench/kv_stream/synthetic_engine.h"
#include "tests/bench/kv_stream/tcp_stream.h"

ABSL_FLAG(int32_t, tokens, 16384, "Prompt length; a token has 131,072 bytes of KV.");
ABSL_FLAG(std::vector<std::string>, lanes, (std::vector<std::string>{"1", "2", "4"}),
          "Numbers of connections to try.");
ABSL_FLAG(int64_t, frame_bytes, int64_t{2} << 20, "KV payload of one message.");
ABSL_FLAG(int32_t, runs, 3, "The best of so many is reported.");

namespace prefilld::bench {
namespace {

class CountingSink : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
};

struct Transfer {
  double seconds = 0.0;
  int64_t bytes = 0;
};

absl::StatusOr<Transfer> StreamOverPrefilld(client::PrefillClient& client, int tokens, int lanes) {
  ::prefill::v1::PrefillRequest request;
  request.mutable_token_ids()->Resize(tokens, 1);
  request.set_num_lanes(lanes);
  CountingSink sink;
  const absl::Time begin = absl::Now();
  const auto result = client.Prefill(request, sink);
  if (!result.ok()) return result.status();
  return Transfer{absl::ToDoubleSeconds(absl::Now() - begin),
                  static_cast<int64_t>(result->kv_bytes())};
}

absl::Status Run() {
  const int tokens = absl::GetFlag(FLAGS_tokens);
  const int64_t frame_bytes = absl::GetFlag(FLAGS_frame_bytes);
  const auto engine = SyntheticEngine::Create(tokens);
  if (!engine.ok()) return engine.status();
  server::ServerOptions options;
  options.listen = "127.0.0.1:0";
  options.metrics_listen = "";
  options.frame_bytes = frame_bytes;
  const auto server = server::PrefillServer::Create(options, **engine, server::Clock::Real());
  if (!server.ok()) return server.status();
  const auto client =
      client::PrefillClient::Create({.address = absl::StrCat("127.0.0.1:", (*server)->port())});
  if (!client.ok()) return client.status();

  std::printf("%6s %10s %16s %10s\n", "lanes", "GB", "prefilld GB/s", "TCP GB/s");
  for (const std::string& text : absl::GetFlag(FLAGS_lanes)) {
    int lanes;
    if (!absl::SimpleAtoi(text, &lanes) || lanes < 1 || lanes > 16) {
      return absl::InvalidArgumentError(absl::StrCat("--lanes: '", text, "' is outside 1 to 16"));
    }
    double best = 0.0, best_tcp = 0.0;
    int64_t bytes = 0;
    for (int run = 0; run < absl::GetFlag(FLAGS_runs); ++run) {
      const auto transfer = StreamOverPrefilld(**client, tokens, lanes);
      if (!transfer.ok()) return transfer.status();
      bytes = transfer->bytes;
      best = std::max(best, bytes / transfer->seconds);
      const auto tcp = StreamOverTcp(bytes, lanes, frame_bytes);
      if (!tcp.ok()) return tcp.status();
      best_tcp = std::max(best_tcp, bytes / *tcp);
    }
    std::printf("%6d %10.2f %16.2f %10.2f\n", lanes, 1e-9 * bytes, 1e-9 * best, 1e-9 * best_tcp);
    std::fflush(stdout);
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace prefilld::bench

int main(int argc, char** argv) {
  prefilld::process::ParseCommandLine(
      argc, argv,
      {.usage = "KV streaming of prefilld beside bare TCP on loopback.",
       .groups = {{"What runs", {"tokens", "lanes", "frame_bytes", "runs"}}}});
  spdlog::set_level(spdlog::level::warn);
  const absl::Status status = prefilld::bench::Run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "kv-stream-bench: %s\n", status.ToString().c_str());
  return 1;
}
