// Tests that prompts computed together give what each gives alone.
//
//   prompt_batch_test [--device=cpu|cuda]
#include <algorithm>
#include <cmath>
#include <memory>
#include <ostream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prefill_engine.h"
#include "tests/model/device_flag.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A GEMM of more rows may add in another order. On the CPU that changes fp32 sums. On CUDA
// activations are bf16, and in four layers of random weights their rounding (2^-9 each) adds up to
// what golden_test allows.
double RelativeTolerance() { return DeviceFlag() == DeviceChoice::kCpu ? 1e-5 : 2e-2; }
// The tolerance of log-probabilities from logits like these. bf16 is spaced by up to 2^-7 of a
// logit: one step for the token's logit, one for the likeliest's, and as much again for the
// rounding of the layers.
double LogprobTolerance(const std::vector<float>& logits) {
  if (DeviceFlag() == DeviceChoice::kCpu) return 1e-4;
  const auto [lowest, highest] = std::minmax_element(logits.begin(), logits.end());
  return std::max(-*lowest, *highest) / 32;
}

using Prompts = std::vector<std::vector<uint32_t>>;

Prompts RandomPrompts(const std::vector<int64_t>& lengths, int64_t vocab_size) {
  Prompts prompts;
  for (const int64_t length : lengths) {
    prompts.push_back(RandomTokens(length, vocab_size, /*seed=*/100 + prompts.size()));
  }
  return prompts;
}

EngineOptions Options(const RandomCheckpoint& checkpoint, int64_t max_batch_tokens) {
  EngineOptions options = CpuEngineOptions(checkpoint.dir(), 800);
  options.device = DeviceFlag();
  options.max_batch_tokens = max_batch_tokens;
  return options;
}

// Returns the Frobenius norm of the difference over that of `expected`.
double RelativeError(const std::vector<float>& actual, const std::vector<float>& expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    difference += std::pow(double{actual[i]} - expected[i], 2);
    norm += std::pow(double{expected[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

void ExpectNear(const std::vector<float>& actual, const std::vector<float>& expected,
                double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_NEAR(actual[i], expected[i], tolerance) << i;
  }
}

void ExpectEachAsAlone(PrefillEngine& engine, const Prompts& prompts) {
  const std::vector<PromptRun> together = RunPrompts(engine, prompts, DenseAttention());
  ASSERT_EQ(together.size(), prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    SCOPED_TRACE(testing::Message() << "prompt " << i << ", " << prompts[i].size() << " tokens");
    const PromptRun alone = RunPrompts(engine, {prompts[i]}, DenseAttention()).front();
    for (size_t layer = 0; layer < alone.kv.size(); ++layer) {
      EXPECT_LE(RelativeError(together[i].kv[layer], alone.kv[layer]), RelativeTolerance())
          << "layer " << layer;
    }
    EXPECT_LE(RelativeError(together[i].logits, alone.logits), RelativeTolerance());
    const double tolerance = LogprobTolerance(alone.logits);
    ExpectNear(together[i].logprobs.of_token, alone.logprobs.of_token, tolerance);
    ExpectNear(together[i].logprobs.of_best, alone.logprobs.of_best, tolerance);
  }
}

TEST(PackedPrompts, BeginAtMultiplesOfABlockAndAtPositionZero) {
  const Prompts prompts = {{7, 8, 9}, std::vector<uint32_t>(128, 5), {4}};
  const PackedPrompts packed({prompts[0], prompts[1], prompts[2]}, /*pad_last=*/false);
  ASSERT_EQ(packed.count(), 3);
  EXPECT_EQ(packed.places()[1].first, 128);
  EXPECT_EQ(packed.places()[1].count, 128);
  EXPECT_EQ(packed.places()[2].first, 256);
  ASSERT_EQ(packed.tokens().size(), 257u);
  EXPECT_THAT(packed.tokens_of(0), ElementsAre(7, 8, 9));
  EXPECT_EQ(packed.tokens()[3], 0u) << "padding";
  EXPECT_THAT(packed.tokens_of(2), ElementsAre(4));
  const std::vector<int32_t> positions = packed.Positions();
  EXPECT_EQ(positions[2], 2);
  EXPECT_EQ(positions[128], 0);
  EXPECT_EQ(positions[255], 127);
  EXPECT_EQ(positions[256], 0);
}

TEST(PackedPrompts, MayBePaddedAtTheEnd) {
  const Prompts prompts = {{7, 8, 9}, {4}};
  const PackedPrompts packed({prompts[0], prompts[1]}, /*pad_last=*/true);
  EXPECT_EQ(packed.tokens().size(), 256u);
  EXPECT_EQ(packed.places()[1].count, 1);
  EXPECT_THAT(packed.tokens_of(1), ElementsAre(4));
  const std::vector<int32_t> positions = packed.Positions();
  ASSERT_EQ(positions.size(), 256u);
  EXPECT_EQ(positions[255], 127);
}

TEST(PackedPrompts, OfAPatternSeeThemselvesAlone) {
  const std::vector<uint32_t> first(130), second(50), third(70);
  const PackedPrompts packed({first, second, third}, /*pad_last=*/false);  // at 0, 256, 384
  EXPECT_THAT(packed.Pattern(128), ElementsAre(0b0001, 0b0011, 0b0100, 0b1000));
  // The padding blocks 3 and 5 have empty rows, which kernels take for the diagonal alone.
  EXPECT_THAT(packed.Pattern(64), ElementsAre(0b1, 0b11, 0b111, 0, 0b10000, 0, 1 << 6, 3 << 6));
}

TEST(PackedPrompts, OfAPatternMayNeedMoreThanOneWordARow) {
  const std::vector<uint32_t> first(31 * 128), second(256);
  const std::vector<uint32_t> pattern =
      PackedPrompts({first, second}, /*pad_last=*/false).Pattern(128);
  ASSERT_EQ(pattern.size(), 33u * 2);
  EXPECT_EQ(pattern[2 * 30], 0x7fffffffu);
  EXPECT_EQ(pattern[2 * 31], 0x80000000u);
  EXPECT_EQ(pattern[2 * 32], 0x80000000u);
  EXPECT_EQ(pattern[2 * 32 + 1], 1u);
}

struct BatchCase {
  const char* name;
  int block_tokens;
  int64_t tile_tokens;  // 0: the device's
  int head_dim;
};

void PrintTo(const BatchCase& c, std::ostream* out) { *out << c.name; }

class PromptBatch : public ::testing::TestWithParam<BatchCase> {};

TEST_P(PromptBatch, OfUnequalLengthsGivesEachWhatItGivesAlone) {
  ModelConfig config = SmallRandomConfig();
  config.head_dim = GetParam().head_dim;
  const RandomCheckpoint checkpoint(config);
  EngineOptions options = Options(checkpoint, 8192);
  options.block_tokens = GetParam().block_tokens;
  options.tile_tokens = GetParam().tile_tokens;
  const auto engine = NewEngine(options);
  ExpectEachAsAlone(*engine,
                    RandomPrompts({1, 127, 128, 129, 300, 64, 65, 2, 700, 1}, config.vocab_size));
  ExpectEachAsAlone(*engine, RandomPrompts({800, 1}, config.vocab_size));
}

INSTANTIATE_TEST_SUITE_P(, PromptBatch,
                         ::testing::Values(BatchCase{"CoarseBlocks", 128, 0, 64},
                                           BatchCase{"FineBlocks", 64, 0, 64},
                                           BatchCase{"WideHeads", 128, 0, 128},
                                           BatchCase{"TilesThatCutPrompts", 64, 96, 64}),
                         [](const auto& info) { return std::string(info.param.name); });

class PromptBatchTest : public ::testing::Test {
 protected:
  const RandomCheckpoint checkpoint_;
};

// There are more prompts than tokens in a tile, and each has logits as wide as the tile's
// activations.
TEST_F(PromptBatchTest, TakesLogitsInTiles) {
  EngineOptions options = Options(checkpoint_, 2048);
  options.tile_tokens = 3;
  const auto engine = NewEngine(options);
  ExpectEachAsAlone(*engine, RandomPrompts({3, 4, 5, 6, 7, 8, 9, 10}, 320));
}

TEST_F(PromptBatchTest, LeavesNoTraceInTheNextPrompt) {
  const auto engine = NewEngine(Options(checkpoint_, 4096));
  const std::vector<uint32_t> tokens = RandomTokens(700, 320);
  const PromptRun before = RunPrompt(*engine, tokens, DenseAttention());
  const size_t bytes = engine->allocated_bytes();
  RunPrompts(*engine, RandomPrompts({300, 5, 400}, 320), DenseAttention());
  EXPECT_EQ(engine->allocated_bytes(), bytes) << "nothing is allocated per batch";
  const PromptRun after = RunPrompt(*engine, tokens, DenseAttention());
  EXPECT_EQ(before.kv, after.kv);
  EXPECT_EQ(before.logits, after.logits);
}

TEST_F(PromptBatchTest, CountsWhatAPromptTakesWithItsPadding) {
  const auto engine = NewEngine(Options(checkpoint_, 4800));
  EXPECT_EQ(engine->max_batch_tokens(), 4800);
  EXPECT_EQ(engine->BatchTokens(1, DenseAttention()), 128);
  EXPECT_EQ(engine->BatchTokens(128, DenseAttention()), 128);
  EXPECT_EQ(engine->BatchTokens(129, DenseAttention()), 256);
  EXPECT_EQ(engine->BatchTokens(512, DenseAttention()), 512);
  EXPECT_EQ(engine->BatchTokens(513, DenseAttention()), 0)
      << "640 with its padding, of which 8 do not fit";
  AttentionOptions sparse;
  sparse.policy = AttentionPolicy::kVerticalSlash;
  EXPECT_EQ(engine->BatchTokens(257, sparse), 0);
  EXPECT_EQ(engine->BatchTokens(256, sparse), 256) << "dense, being so short";
}

TEST_F(PromptBatchTest, RefusesWhatDoesNotFitTogether) {
  const auto engine = NewEngine(Options(checkpoint_, 3072));
  const std::vector<uint32_t> tokens = RandomTokens(300, 320);
  const auto start = [&](std::vector<PromptInput> prompts) {
    return engine->Start(prompts).status();
  };
  EXPECT_EQ(start({}).code(), absl::StatusCode::kInvalidArgument);
  const PromptInput prompt = {tokens, DenseAttention()};
  EXPECT_TRUE(start(std::vector<PromptInput>(8, prompt)).ok());
  const absl::Status full = start(std::vector<PromptInput>(9, prompt));
  EXPECT_EQ(full.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(full.message(), HasSubstr("a batch of 3456 tokens; at most 3072"));
  PromptInput sparse = prompt;
  sparse.attention.policy = AttentionPolicy::kVerticalSlash;
  const PromptInput small = {absl::MakeConstSpan(tokens).first(5), DenseAttention()};
  const absl::Status not_dense = start({small, sparse});
  EXPECT_EQ(not_dense.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(not_dense.message(), HasSubstr("vertical_slash runs alone"));
  EXPECT_EQ(start({small, {{}, DenseAttention()}}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(start({small, small, small, small}).ok());
}

TEST_F(PromptBatchTest, HasAPlaceForEveryPromptAndNoOther) {
  const auto engine = NewEngine(Options(checkpoint_, 1024));
  const std::vector<uint32_t> tokens = RandomTokens(100, 320);
  const PromptInput prompt = {tokens, DenseAttention()};
  const auto sequence = engine->Start({prompt, prompt});
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  EXPECT_EQ((*sequence)->policy(), AttentionPolicy::kDense);
  ASSERT_TRUE((*sequence)->RunLayer().ok());
  KvSelection selection =
      WholeLayer(checkpoint_.config(), 100, 16, kernels::KvOrder::kNhd, kernels::DType::kFp32);
  for (const int outside : {-1, 2}) {
    selection.prompt = outside;
    const absl::Status status = (*sequence)->PackKv(0, selection, nullptr);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("outside the batch of 2"));
  }
  selection.prompt = 0;
  selection.num_blocks = 8;  // the eighth is padding
  EXPECT_EQ((*sequence)->PackKv(0, selection, nullptr).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PromptBatchTest, IsOffOnTheCpuAndOnElsewhereUnlessSaidOtherwise) {
  EngineOptions options = Options(checkpoint_, 0);
  EXPECT_EQ(NewEngine(options)->BatchTokens(1, DenseAttention()), 0);
  options.max_batch_tokens.reset();
  EXPECT_EQ(NewEngine(options)->max_batch_tokens(), DeviceFlag() == DeviceChoice::kCpu ? 0 : 2048);
  for (const int64_t outside : {int64_t{-1}, int64_t{1} << 20}) {
    options.max_batch_tokens = outside;
    EXPECT_THAT(CreatePrefillEngine(options).status().message(), HasSubstr("max_batch_tokens"));
  }
}

TEST(PromptBatchOfDynamicNtk, TakesPromptsOfOneRotationAlone) {
  ModelConfig config = SmallRandomConfig();
  config.rope.kind = RopeKind::kDynamicNtk;
  config.rope.factor = 2.0;
  config.rope.original_max_positions = config.max_positions = 256;
  const RandomCheckpoint checkpoint(config);
  const auto engine = NewEngine(Options(checkpoint, 4096));
  EXPECT_EQ(engine->BatchTokens(256, DenseAttention()), 256);
  EXPECT_EQ(engine->BatchTokens(257, DenseAttention()), 0);
  ExpectEachAsAlone(*engine, RandomPrompts({256, 3, 200}, config.vocab_size));
}

}  // namespace
}  // namespace prefilld::model

int main(int argc, char** argv) { return prefilld::model::RunTestsOnDevice(argc, argv); }
