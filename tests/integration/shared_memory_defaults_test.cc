// Tests that a decode worker and prefilld on one host use shared memory without a flag, and that
// the tokens are those of one process, with it and without.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/integration/generate_client.h"
#include "tests/integration/greedy_reference.h"
#include "tests/integration/metrics_page.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

constexpr int kPrompt = 1500;  // 12 MB of KV
constexpr int kNewTokens = 8;

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = 8;
  return config;
}

TEST(SharedMemoryDefaults, ADecodeWorkerOfTheSameHostUsesItAndHasTheTokensOfOneProcess) {
  const model::RandomCheckpoint checkpoint(Config(), 7);
  const auto prompt = model::RandomTokens(kPrompt, Config().vocab_size, 3);
  const auto reference = GreedyReference(checkpoint.dir(), prompt, kNewTokens);
  for (const bool by_default : {true, false}) {
    std::vector<std::string> flags = {"--model=" + checkpoint.dir(), "--device=cpu"};
    if (!by_default) flags.push_back("--shared_memory_bytes=0");
    ServerProcess server("prefilld", flags);
    ServerProcess worker("prefilld-decode-worker",
                         {"--model=" + checkpoint.dir(), "--device=cpu",
                          "--prefill_address=" + server.address(), "--kv_pool_tokens=4096"});
    for (int request = 0; request < 3; ++request) {
      const Generation generation = Generate(worker.address(), DenseRequest(prompt, kNewTokens));
      ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
      EXPECT_THAT(generation.tokens, ElementsAreArray(reference));
      EXPECT_EQ(generation.result.prefill().shared_memory_bytes() > 0, by_default);
    }
    const MetricsPage page(server.metrics_address());
    const std::string came = "prefilld_shared_memory_connections_total";
    EXPECT_EQ(page.Value(came + "{result=\"attached\"}"), by_default ? 1 : 0);
    EXPECT_EQ(page.Value(came + "{result=\"attached_again\"}"), by_default ? 2 : 0);
    const std::string transport = by_default ? "shared_memory" : "grpc";
    EXPECT_EQ(MetricsPage(worker.metrics_address())
                  .Value("prefilld_decode_kv_pulls_total{transport=\"" + transport + "\"}"),
              3);
    if (by_default) {
      EXPECT_THAT(server.stderr_text(), HasSubstr("shared_memory_bytes=1"));
    } else {
      EXPECT_THAT(worker.stderr_text(), HasSubstr("kv_over_grpc"));
    }
  }
}

}  // namespace
}  // namespace prefilld::integration
