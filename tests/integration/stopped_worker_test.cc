// Tests a decode worker that is stopped (SIGSTOP) with a transfer on its way and another request in
// prefilld's queue: its machine goes on answering for it, its process takes nothing.
#include <signal.h>

#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/integration/generate_client.h"
#include "tests/integration/metrics_page.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

// Its KV, 74 MB, is more than sockets and staging buffers hold.
constexpr int kPrompt = 6000;
constexpr absl::Duration kPatience = absl::Seconds(60);

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = 12;
  config.max_positions = 8192;
  return config;
}

// With gRPC's own time-out of the socket the connection would end after 12 to 15 s, and the waiting
// request with it.
TEST(StoppedWorker, LosesTheTransferThatStallsAndNotTheRequestBehindIt) {
  const model::RandomCheckpoint checkpoint(Config());
  const ServerProcess prefilld(
      "prefilld", {"--model=" + checkpoint.dir(), "--device=cpu", "--cpu_threads=2",
                   "--max_resident_tokens=8192", "--max_batch_tokens=512", "--stall_timeout_s=18",
                   "--min_consumer_mb_per_s=0", "--staging_bytes=8388608"});
  ServerProcess worker("prefilld-decode-worker",
                       {"--model=" + checkpoint.dir(), "--device=cpu", "--cpu_threads=1",
                        "--prefill_address=" + prefilld.address(), "--kv_pool_tokens=16384"});
  const auto generate = [&](int seed, Generation& generation) {
    const auto prompt = model::RandomTokens(kPrompt, Config().vocab_size, seed);
    generation = Generate(worker.address(), DenseRequest(prompt, 4));
  };
  const auto wait_for = [&](const std::string& sample, double value) {
    ASSERT_TRUE(WaitForMetrics(prefilld.metrics_address(), kPatience,
                               [&](const auto& page) { return page.Value(sample) == value; }))
        << sample << "\n"
        << MetricsPage(prefilld.metrics_address()).text();
  };

  Generation stalled, waited;
  std::thread first([&] { generate(1, stalled); });
  wait_for("prefilld_running_requests", 1);
  std::thread second([&] { generate(2, waited); });
  wait_for("prefilld_queued_requests", 1);
  worker.Signal(SIGSTOP);
  const absl::Time stopped = absl::Now();
  wait_for("prefilld_queued_requests", 0);
  EXPECT_GT(absl::Now() - stopped, absl::Seconds(17));
  worker.Signal(SIGCONT);
  first.join();
  second.join();

  EXPECT_EQ(stalled.status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(stalled.status.error_message(), HasSubstr("took nothing"));
  EXPECT_TRUE(waited.status.ok()) << waited.status.error_message();
  EXPECT_THAT(waited.tokens, SizeIs(4));
  wait_for("prefilld_live_requests", 0);
  wait_for("prefilld_staged_bytes", 0);
}

}  // namespace
}  // namespace prefilld::integration
