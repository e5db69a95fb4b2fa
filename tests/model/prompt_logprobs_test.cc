// How likely the model finds a prompt, token by token (model/prefill/prompt_logprobs.h).
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/prefill/prefill_engine.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

class PromptLogprobsTest : public ::testing::Test {
 protected:
  const RandomCheckpoint checkpoint_;
};

struct LogprobsCase {
  const char* name;
  int64_t vocab_size;
  int64_t tile_tokens;
  int64_t max_tokens;
  int num_tiles;  // of a prompt of max_tokens
};

class PromptLogprobsTiles : public ::testing::TestWithParam<LogprobsCase> {};

TEST_P(PromptLogprobsTiles, AreThoseOfTheLogitsOfEveryBeginning) {
  const LogprobsCase& c = GetParam();
  ModelConfig config = SmallRandomConfig();
  config.vocab_size = c.vocab_size;
  const RandomCheckpoint checkpoint(config);
  EngineOptions options = CpuEngineOptions(checkpoint.dir(), 1200);
  options.tile_tokens = c.tile_tokens;
  options.max_tokens = c.max_tokens;
  const auto engine = NewEngine(options);
  const std::vector<uint32_t> tokens = RandomTokens(c.max_tokens, c.vocab_size);
  auto sequence = RunLayers(*engine, tokens, DenseAttention(), /*logprobs=*/true);
  int num_tiles = 0;
  const PromptLogprobs logprobs = AllLogprobs(*sequence, 0, &num_tiles);
  sequence.reset();
  EXPECT_EQ(num_tiles, c.num_tiles);
  ASSERT_EQ(logprobs.of_token.size(), tokens.size() - 1);
  ASSERT_EQ(logprobs.of_best.size(), tokens.size() - 1);
  for (const size_t length :
       {size_t{1}, size_t{2}, size_t{15}, size_t{16}, size_t{17}, size_t{39}}) {
    if (length >= tokens.size()) continue;
    const std::vector<float> logits =
        RunPrompt(*engine, {tokens.begin(), tokens.begin() + length}, DenseAttention()).logits;
    double sum = 0.0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
    const double best = *std::max_element(logits.begin(), logits.end());
    EXPECT_NEAR(logprobs.of_token[length - 1], logits[tokens[length]] - std::log(sum), 1e-4)
        << length;
    EXPECT_NEAR(logprobs.of_best[length - 1], best - std::log(sum), 1e-4) << length;
  }
}

// A token has 512 elements of wide activations, so a tile of 16 tokens has room for the 3000 logits
// of 2.
INSTANTIATE_TEST_SUITE_P(
    Tiles, PromptLogprobsTiles,
    ::testing::Values(LogprobsCase{"AsWideAsALayers", 320, 16, 40, 3},
                      LogprobsCase{"NarrowedByTheVocabulary", 3000, 16, 40, 20},
                      LogprobsCase{"OfATokenWhoseLogitsOutgrowATile", 3000, 512, 3, 2}),
    [](const auto& info) { return std::string(info.param.name); });

// Whoever computes them may stop after any part, begin anew, and ask for the logits again.
TEST_F(PromptLogprobsTest, LeaveTheHiddenStatesAsTheyWere) {
  EngineOptions options = CpuEngineOptions(checkpoint_.dir(), 1200);
  options.tile_tokens = 16;
  const auto engine = NewEngine(options);
  const auto sequence =
      RunLayers(*engine, RandomTokens(100, 320), DenseAttention(), /*logprobs=*/true);
  const auto logits = sequence->FinalLogits();
  const auto part = sequence->Logprobs(0, 32);
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_EQ(part->of_token.size(), 16u);
  const PromptLogprobs all = AllLogprobs(*sequence);
  ASSERT_EQ(all.of_token.size(), 99u);
  for (size_t i = 0; i < 16; ++i) EXPECT_EQ(part->of_token[i], all.of_token[32 + i]) << i;
  EXPECT_EQ(*sequence->FinalLogits(), *logits);
}

TEST_F(PromptLogprobsTest, NeedAllLayers) {
  const auto engine = NewEngine(CpuEngineOptions(checkpoint_.dir(), 1200));
  auto started = engine->Start(RandomTokens(40, 320), DenseAttention());
  ASSERT_TRUE(started.ok());
  ASSERT_TRUE((*started)->RunLayer().ok());
  EXPECT_EQ((*started)->Logprobs(0, 0).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(PromptLogprobsTest, MustBeAskedForAtTheStart) {
  const auto engine = NewEngine(CpuEngineOptions(checkpoint_.dir(), 1200));
  auto sequence = engine->Start(RandomTokens(40, 320), DenseAttention());
  ASSERT_TRUE(sequence.ok());
  for (int layer = 0; layer < checkpoint_.config().num_layers; ++layer) {
    ASSERT_TRUE((*sequence)->RunLayer().ok());
    (*sequence)->ReleaseKv(layer);
  }
  EXPECT_EQ((*sequence)->Logprobs(0, 0).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(PromptLogprobsTest, OfAPromptOfOneTokenAreNone) {
  const auto engine = NewEngine(CpuEngineOptions(checkpoint_.dir(), 1200));
  const auto logprobs =
      RunLayers(*engine, {7}, DenseAttention(), /*logprobs=*/true)->Logprobs(0, 0);
  ASSERT_TRUE(logprobs.ok()) << logprobs.status();
  EXPECT_TRUE(logprobs->of_token.empty());
}

}  // namespace
}  // namespace prefilld::model
