// Tests that layers replayed as CUDA graphs, and layers queued ahead of the one that is waited for,
// give what layers launched one by one give.
#include <cmath>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "model/prefill/prefill_engine.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

class Replay : public ::testing::Test {
 protected:
  std::unique_ptr<PrefillEngine> Create(int64_t max_graph_tokens) {
    EngineOptions options;
    options.checkpoint_dir = checkpoint_.dir();
    options.device = DeviceChoice::kCuda;
    options.max_tokens = 1000;
    options.max_batch_tokens = 2048;
    options.max_graph_tokens = max_graph_tokens;
    return NewEngine(options);
  }

  std::vector<uint32_t> Prompt(int64_t length, uint64_t seed) {
    return RandomTokens(length, checkpoint_.config().vocab_size, seed);
  }

  RandomCheckpoint checkpoint_;
};

void ExpectSame(const PromptRun& a, const PromptRun& b) {
  EXPECT_EQ(a.logits, b.logits);
  EXPECT_EQ(a.kv, b.kv);
}

// Returns ||a - b|| / ||b||.
double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0, norm = 0.0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

// The same prompt is launched, recorded and replayed, with other prompts of its length between. An
// engine that records nothing pads nothing, so its products have other shapes and may add in
// another order.
TEST_F(Replay, GivesWhatWasLaunched) {
  const auto engine = Create(512);
  const auto unpadded = Create(0);
  for (const int64_t length : {1, 100, 128, 129, 500}) {
    const int64_t before = engine->num_recordings();
    const PromptRun launched = RunPrompt(*engine, Prompt(length, 1), DenseAttention());
    for (int i = 0; i < 3; ++i) {
      RunPrompt(*engine, Prompt(length, 2 + i), DenseAttention());
      ExpectSame(RunPrompt(*engine, Prompt(length, 1), DenseAttention()), launched);
    }
    const PromptRun plain = RunPrompt(*unpadded, Prompt(length, 1), DenseAttention());
    EXPECT_LT(RelativeError(launched.logits, plain.logits), 2e-2) << length;
    const bool is_new = length != 100 && length != 128;
    EXPECT_EQ(engine->num_recordings() > before, is_new) << length;
  }
}

TEST_F(Replay, OfABatchGivesWhatWasLaunched) {
  const auto engine = Create(2048);
  const std::vector<std::vector<uint32_t>> prompts = {Prompt(70, 1), Prompt(128, 2),
                                                      Prompt(200, 3)};
  const std::vector<std::vector<uint32_t>> others = {Prompt(256, 4), Prompt(1, 5), Prompt(9, 6)};
  const std::vector<PromptRun> launched = RunPrompts(*engine, prompts, DenseAttention());
  for (int i = 0; i < 3; ++i) {
    RunPrompts(*engine, others, DenseAttention());
    const std::vector<PromptRun> again = RunPrompts(*engine, prompts, DenseAttention());
    for (size_t p = 0; p < prompts.size(); ++p) {
      ExpectSame(again[p], launched[p]);
      EXPECT_EQ(again[p].logprobs.of_token, launched[p].logprobs.of_token);
    }
  }
  EXPECT_GE(engine->num_recordings(), checkpoint_.config().num_layers);
}

TEST_F(Replay, IsOffForLongerPromptsAndWhereToldSo) {
  const auto never = Create(0);
  const auto short_ones = Create(256);
  for (int i = 0; i < 3; ++i) {
    RunPrompt(*never, Prompt(100, 1), DenseAttention());
    RunPrompt(*short_ones, Prompt(300, 1), DenseAttention());
  }
  EXPECT_EQ(never->num_recordings(), 0);
  EXPECT_EQ(short_ones->num_recordings(), 0);
}

TEST_F(Replay, TheLastLayerComputesNoMoreThanIsRead) {
  const auto engine = Create(0);
  for (const int64_t length : {1, 2, 128, 129, 700}) {
    const PromptRun narrow = RunPrompt(*engine, Prompt(length, 1), DenseAttention());
    const PromptRun whole = RunPrompts(*engine, {Prompt(length, 1)}, DenseAttention()).front();
    EXPECT_LT(RelativeError(narrow.logits, whole.logits), 2e-2) << length;
    EXPECT_LT(RelativeError(narrow.kv.back(), whole.kv.back()), 2e-2) << length;
    EXPECT_EQ(narrow.reports.back().num_queries, 1);
  }
}

// When a sequence is destroyed, a layer of it that is still under way must not write into the next
// sequence.
TEST_F(Replay, AnAbandonedLayerAheadLeavesNoTrace) {
  for (const int64_t max_graph_tokens : {0, 2048}) {
    const auto engine = Create(max_graph_tokens);
    const PromptRun alone = RunPrompt(*engine, Prompt(300, 1), DenseAttention());
    for (int i = 0; i < 6; ++i) {
      {
        auto abandoned = engine->Start(Prompt(900, 2), DenseAttention());
        ASSERT_TRUE(abandoned.ok()) << abandoned.status();
        for (int layer = 0; layer < i % 3; ++layer) ASSERT_TRUE((*abandoned)->RunLayer().ok());
      }
      ExpectSame(RunPrompt(*engine, Prompt(300, 1), DenseAttention()), alone);
    }
  }
}

// The consumer is slow, so that no slot is free for a layer ahead.
TEST_F(Replay, HeldSlotsDelayTheLayerAhead) {
  const auto engine = Create(2048);
  const PromptRun alone = RunPrompt(*engine, Prompt(300, 1), DenseAttention());
  auto started = engine->Start(Prompt(300, 1), DenseAttention());
  ASSERT_TRUE(started.ok());
  PrefillSequence& sequence = **started;
  for (int i = 0; i < engine->kv_slots(); ++i) ASSERT_TRUE(sequence.RunLayer().ok());
  EXPECT_EQ(sequence.RunLayer().status().code(), absl::StatusCode::kFailedPrecondition);
  const int num_layers = engine->info().config.num_layers;
  for (int layer = engine->kv_slots(); layer < num_layers; ++layer) {
    sequence.ReleaseKv(layer - engine->kv_slots() + 1);
    ASSERT_TRUE(sequence.RunLayer().ok());
  }
  const auto logits = sequence.FinalLogits();
  ASSERT_TRUE(logits.ok());
  EXPECT_EQ(logits->front(), alone.logits);
}

}  // namespace
}  // namespace prefilld::model
