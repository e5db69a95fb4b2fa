#include "model/prefill/prefill_engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/prefill/engine_parts.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;

EngineOptions CpuEngine(const RandomCheckpoint& checkpoint) {
  return CpuEngineOptions(checkpoint.dir(), 1200);
}

double LargestDifference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max<double>(largest, std::abs(a[i] - b[i]));
  }
  return largest;
}

class PrefillEngineTest : public ::testing::Test {
 protected:
  const RandomCheckpoint checkpoint_;
};

TEST_F(PrefillEngineTest, InfoDescribesTheCheckpointAndTheDevice) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  const EngineInfo& info = engine->info();
  EXPECT_EQ(info.device_name, "cpu");
  EXPECT_EQ(info.native_dtype, kernels::DType::kFp32);
  EXPECT_EQ(info.config.num_layers, checkpoint_.config().num_layers);
  EXPECT_EQ(info.fingerprint.size(), 32u);
  EXPECT_EQ(info.max_tokens, 1200);
  EXPECT_THAT(checkpoint_.dir(), HasSubstr(info.model_name));
  EXPECT_GE(engine->kv_slots(), 2);
  EXPECT_GT(engine->allocated_bytes(), 0u);
}

// The tile width of the wide projections is an implementation detail. Another width gives the same
// numbers up to the summation order of the GEMM.
TEST_F(PrefillEngineTest, TileWidthDoesNotChangeTheResult) {
  EngineOptions narrow_options = CpuEngine(checkpoint_);
  narrow_options.tile_tokens = 48;
  const auto wide = NewEngine(CpuEngine(checkpoint_));
  const auto narrow = NewEngine(narrow_options);
  for (int64_t length : {1, 17, 127, 128, 129, 1000}) {
    const auto tokens = RandomTokens(length, checkpoint_.config().vocab_size);
    const PromptRun a = RunPrompt(*wide, tokens, DenseAttention());
    const PromptRun b = RunPrompt(*narrow, tokens, DenseAttention());
    EXPECT_LT(LargestDifference(a.logits, b.logits), 1e-3) << length;
    for (size_t layer = 0; layer < a.kv.size(); ++layer) {
      EXPECT_LT(LargestDifference(a.kv[layer], b.kv[layer]), 1e-3) << length;
    }
  }
}

TEST_F(PrefillEngineTest, KeysOfAPrefixDoNotDependOnWhatFollows) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  auto tokens = RandomTokens(300, checkpoint_.config().vocab_size);
  const PromptRun whole = RunPrompt(*engine, tokens, DenseAttention());
  tokens.resize(140);
  const PromptRun prefix = RunPrompt(*engine, tokens, DenseAttention());
  const int head_dim = checkpoint_.config().head_dim;
  for (size_t layer = 0; layer < whole.kv.size(); ++layer) {
    const std::vector<float> a(whole.kv[layer].begin(), whole.kv[layer].begin() + 128 * head_dim);
    const std::vector<float> b(prefix.kv[layer].begin(), prefix.kv[layer].begin() + 128 * head_dim);
    EXPECT_LT(LargestDifference(a, b), 1e-3) << "layer " << layer;
  }
}

TEST_F(PrefillEngineTest, ReportsOfADensePromptCountEveryHeadOnce) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  const auto run = RunPrompt(*engine, RandomTokens(200, 320), DenseAttention());
  for (size_t layer = 0; layer < run.reports.size(); ++layer) {
    const LayerReport& report = run.reports[layer];
    EXPECT_EQ(report.layer, static_cast<int>(layer));
    const bool is_last = layer + 1 == run.reports.size();
    EXPECT_EQ(report.dense_heads, is_last ? 0 : checkpoint_.config().num_heads);
    EXPECT_EQ(report.density, 1.0);
    EXPECT_GE(report.compute_us, report.attention_us + report.pattern_us);
  }
}

TEST_F(PrefillEngineTest, PackingAPartEqualsThatPartOfTheWhole) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  const ModelConfig& config = checkpoint_.config();
  const auto tokens = RandomTokens(100, config.vocab_size);
  auto sequence = engine->Start(tokens, DenseAttention());
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  ASSERT_TRUE((*sequence)->RunLayer().ok());

  KvSelection selection =
      WholeLayer(config, 100, 16, kernels::KvOrder::kHnd, kernels::DType::kBf16);
  const auto whole = PackLayer(*engine, **sequence, 0, selection);
  selection.first_block = 2;
  selection.num_blocks = 3;
  selection.first_head = 1;
  selection.num_heads = 1;
  const auto part = PackLayer(*engine, **sequence, 0, selection);

  const size_t head_bytes = 16 * config.head_dim * 2;
  const size_t tensor_bytes = 7 * 2 * head_bytes;  // 7 blocks of 2 heads
  for (size_t tensor = 0; tensor < 2; ++tensor) {
    for (size_t block = 0; block < 3; ++block) {
      const auto a = part.begin() + (tensor * 3 + block) * head_bytes;
      const auto b = whole.begin() + tensor * tensor_bytes + ((block + 2) * 2 + 1) * head_bytes;
      EXPECT_TRUE(std::equal(a, a + head_bytes, b)) << tensor << " " << block;
    }
  }
}

TEST_F(PrefillEngineTest, RefusesPromptsWithFieldValueAndLimit) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  EXPECT_EQ(engine->Start({}, DenseAttention()).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto too_long = engine->Start(RandomTokens(1201, 320), DenseAttention()).status();
  EXPECT_EQ(too_long.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(too_long.message(), HasSubstr("1201 tokens is outside [1, 1200]"));
  const auto outside = engine->Start({5, 320}, DenseAttention()).status();
  EXPECT_EQ(outside.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(outside.message(), HasSubstr("token_ids[1] 320 is outside the vocabulary of 320"));
  AttentionOptions bad = DenseAttention();
  bad.gamma = 0;
  EXPECT_EQ(engine->Start({5}, bad).status().code(), absl::StatusCode::kInvalidArgument);
  // None of these refused requests keeps the engine busy.
  EXPECT_TRUE(engine->Start({5}, DenseAttention()).ok());
}

TEST_F(PrefillEngineTest, RefusesOptionsItCannotHonour) {
  for (const auto& [change, message] :
       std::vector<std::pair<void (*)(EngineOptions&), std::string>>{
           {[](EngineOptions& o) { o.kv_slots = 1; }, "kv_slots 1"},
           {[](EngineOptions& o) { o.block_tokens = 32; }, "block_tokens 32"},
           {[](EngineOptions& o) { o.max_tokens = -1; }, "max_tokens -1"},
           {[](EngineOptions& o) { o.max_tokens = 5000; }, "max_tokens 5000"},
           {[](EngineOptions& o) { o.tile_tokens = -1; }, "tile_tokens -1"},
           {[](EngineOptions& o) { o.long_prompts = 0; }, "long_prompts 0 is outside 1 to 15"},
           {[](EngineOptions& o) { o.short_prompts = 15; }, "short_prompts 15 is outside 0 to 14"},
           {[](EngineOptions& o) { o.max_resident_tokens = -1; }, "max_resident_tokens -1"},
           {[](EngineOptions& o) {
              o.max_tokens = 2000;
              o.max_resident_tokens = 1999;
            },
            "max_resident_tokens 1999 is below 2000, the longest prompt or batch"},
           {[](EngineOptions& o) { o.attention_overrides.tau = NAN; }, "attention.tau"},
       }) {
    EngineOptions options = CpuEngine(checkpoint_);
    change(options);
    const auto status = CreatePrefillEngine(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(message));
  }
}

TEST_F(PrefillEngineTest, AsManySequencesAtATimeAsThereArePlaces) {
  EngineOptions options = CpuEngine(checkpoint_);
  options.long_prompts = 1;
  options.short_prompts = 1;
  const auto engine = NewEngine(options);
  auto first = engine->Start({1, 2, 3}, DenseAttention());
  ASSERT_TRUE(first.ok());
  auto second = engine->Start({1, 2, 3}, DenseAttention());
  ASSERT_TRUE(second.ok());
  const absl::Status third = engine->Start({1}, DenseAttention()).status();
  EXPECT_EQ(third.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(third.message(), HasSubstr("1 tokens: other prompts have all 2 places"));
  first->reset();
  EXPECT_TRUE(engine->Start({1}, DenseAttention()).ok());
}

TEST(PlacesWithin, HoldNoMoreTokensThanAreAllowed) {
  EXPECT_THAT(PlacesWithin(1000, 1000, 200, 4), ElementsAre(1000));
  EXPECT_THAT(PlacesWithin(1500, 1000, 200, 4), ElementsAre(1000, 200, 200));
  EXPECT_THAT(PlacesWithin(1900, 1000, 200, 4), ElementsAre(1000, 200, 200, 200, 200));
  EXPECT_THAT(PlacesWithin(1950, 1000, 200, 1), ElementsAre(1000, 200, 640)) << "what is left";
  EXPECT_THAT(PlacesWithin(3300, 1000, 200, 1), ElementsAre(1000, 200, 1000, 1000));
  EXPECT_THAT(PlacesWithin(int64_t{1} << 40, 1000, 200, 4), SizeIs(kMaxPromptStates));
}

TEST_F(PrefillEngineTest, PromptsUnderWayHaveNoMoreTokensThanMayBeResident) {
  EngineOptions options = CpuEngine(checkpoint_);
  options.max_tokens = 2000;
  options.short_prompts = 1;
  options.max_resident_tokens = 5000;
  const auto engine = NewEngine(options);
  EXPECT_EQ(engine->resident_tokens().limit, 2000 + 2000 + 896);
  EXPECT_EQ(engine->resident_tokens().used, 0);
  std::vector<std::unique_ptr<PrefillSequence>> sequences;
  const auto start = [&](int64_t num_tokens) {
    auto sequence =
        engine->Start(RandomTokens(num_tokens, checkpoint_.config().vocab_size), DenseAttention());
    if (sequence.ok()) sequences.push_back(*std::move(sequence));
    return sequence.status();
  };
  EXPECT_TRUE(start(1900).ok());
  EXPECT_TRUE(start(2000).ok());
  EXPECT_EQ(start(897).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(start(896).ok());
  EXPECT_EQ(engine->resident_tokens().used, 1900 + 2000 + 896);
  sequences.clear();
  EXPECT_EQ(engine->resident_tokens().used, 0);
}

TEST_F(PrefillEngineTest, MeasuresLayersAtStartIfItIsAsked) {
  EngineOptions options = CpuEngine(checkpoint_);
  EXPECT_THAT(NewEngine(options)->info().layer_times, SizeIs(0));
  options.measure_layers = true;
  const auto engine = NewEngine(options);
  for (const AttentionPolicy policy : {AttentionPolicy::kDense, AttentionPolicy::kShare}) {
    std::vector<int64_t> lengths;
    for (const LayerTime& measured : engine->info().layer_times) {
      if (measured.policy != policy) continue;
      lengths.push_back(measured.num_tokens);
      EXPECT_GT(measured.us, 0.0);
    }
    ASSERT_THAT(lengths, Not(SizeIs(0))) << Name(policy);
    EXPECT_EQ(lengths.front(), std::min<int64_t>(128, engine->info().max_tokens));
    EXPECT_LE(lengths.back(), engine->info().max_tokens);
    EXPECT_TRUE(std::is_sorted(lengths.begin(), lengths.end()));
  }
  EXPECT_EQ(engine->resident_tokens().used, 0);
}

TEST_F(PrefillEngineTest, EveryPlaceTakesTheMemoryThatIsStated) {
  EngineOptions options = CpuEngine(checkpoint_);
  options.max_tokens = 4096;
  options.max_batch_tokens = 256;
  const auto only_long = [&](int long_prompts) {
    options.long_prompts = long_prompts;
    options.short_prompts = 0;
    return NewEngine(options);
  };
  // PromptState lists these parts: hidden states, KV slots, and what a batch takes.
  const ModelConfig& config = checkpoint_.config();
  const int64_t kv_width = int64_t{config.num_kv_heads} * config.head_dim;
  const auto one = only_long(1), three = only_long(3);
  const int64_t state_bytes = 4096 * 4 * (config.hidden + one->kv_slots() * 2 * kv_width);
  const auto extra = static_cast<int64_t>(three->allocated_bytes() - one->allocated_bytes());
  EXPECT_GE(extra, 2 * state_bytes);
  EXPECT_LT(extra, 2 * state_bytes + 2 * 4096) << "positions and pattern of a batch";
  EXPECT_NE(only_long(kMaxPromptStates), nullptr);
  auto held = one->Start({1}, DenseAttention());
  ASSERT_TRUE(held.ok());
  EXPECT_EQ(one->Start({1}, DenseAttention()).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_F(PrefillEngineTest, UnreleasedLayersAreLimitedByTheSlots) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  auto started = engine->Start(RandomTokens(20, 320), DenseAttention());
  ASSERT_TRUE(started.ok());
  PrefillSequence& sequence = **started;
  for (int i = 0; i < engine->kv_slots(); ++i) ASSERT_TRUE(sequence.RunLayer().ok());
  EXPECT_EQ(sequence.RunLayer().status().code(), absl::StatusCode::kFailedPrecondition);
  std::thread([&] { sequence.ReleaseKv(1); }).join();
  const auto report = sequence.RunLayer();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->layer, engine->kv_slots());
}

TEST_F(PrefillEngineTest, StepsOutOfOrderAreRefused) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  auto started = engine->Start({1, 2, 3}, DenseAttention());
  ASSERT_TRUE(started.ok());
  PrefillSequence& sequence = **started;
  const KvSelection selection =
      WholeLayer(checkpoint_.config(), 3, 16, kernels::KvOrder::kNhd, kernels::DType::kFp32);
  std::vector<float> block(2 * 16 * 2 * 64);
  EXPECT_FALSE(sequence.PackKv(0, selection, block.data()).ok()) << "not computed";
  EXPECT_FALSE(sequence.FinalLogits().ok()) << "layers are missing";
  for (int layer = 0; layer < checkpoint_.config().num_layers; ++layer) {
    ASSERT_TRUE(sequence.RunLayer().ok());
    ASSERT_TRUE(sequence.PackKv(layer, selection, block.data()).ok());
    sequence.ReleaseKv(layer);
    EXPECT_FALSE(sequence.PackKv(layer, selection, block.data()).ok()) << "released";
  }
  EXPECT_FALSE(sequence.RunLayer().ok()) << "no layer is left";
  EXPECT_TRUE(sequence.FinalLogits().ok());
}

TEST_F(PrefillEngineTest, PackingOutsideThePromptIsRefused) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  auto started = engine->Start(RandomTokens(100, 320), DenseAttention());
  ASSERT_TRUE(started.ok());
  ASSERT_TRUE((*started)->RunLayer().ok());
  const KvSelection good =
      WholeLayer(checkpoint_.config(), 100, 16, kernels::KvOrder::kNhd, kernels::DType::kFp32);
  for (void (*change)(KvSelection&) : std::vector<void (*)(KvSelection&)>{
           [](KvSelection& s) { s.block_tokens = 24; },
           [](KvSelection& s) { s.first_block = 1; },
           [](KvSelection& s) { s.first_block = -1; },
           [](KvSelection& s) { s.num_blocks = 0; },
           [](KvSelection& s) { s.num_blocks = std::numeric_limits<int64_t>::max(); },
           [](KvSelection& s) { s.first_head = 1; },
           [](KvSelection& s) { s.num_heads = 0; },
       }) {
    KvSelection selection = good;
    change(selection);
    EXPECT_EQ((*started)->PackKv(0, selection, nullptr).code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(PrefillEngineTest, ASequenceAbandonedBetweenLayersLeavesNoTrace) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  const auto tokens = RandomTokens(300, 320, 7);
  const PromptRun before = RunPrompt(*engine, tokens, DenseAttention());
  const size_t bytes = engine->allocated_bytes();
  for (int layers = 0; layers < 3; ++layers) {
    auto abandoned = engine->Start(RandomTokens(900, 320, 8), DenseAttention());
    ASSERT_TRUE(abandoned.ok());
    for (int layer = 0; layer < layers; ++layer) ASSERT_TRUE((*abandoned)->RunLayer().ok());
  }
  EXPECT_EQ(engine->allocated_bytes(), bytes);
  const PromptRun after = RunPrompt(*engine, tokens, DenseAttention());
  EXPECT_EQ(before.logits, after.logits);
  EXPECT_EQ(before.kv, after.kv);
}

TEST_F(PrefillEngineTest, NoStepAllocatesDeviceMemory) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  const size_t bytes = engine->allocated_bytes();
  for (AttentionPolicy policy : {AttentionPolicy::kDense, AttentionPolicy::kVerticalSlash}) {
    AttentionOptions options;
    options.policy = policy;
    auto sequence = engine->Start(RandomTokens(1200, 320), options);
    ASSERT_TRUE(sequence.ok());
    ASSERT_TRUE((*sequence)->RunLayer().ok());
    EXPECT_EQ(engine->allocated_bytes(), bytes) << Name(policy);
  }
}

TEST(PrefillEngine, OperatorsWordStandsOverTheClusterFilesOverTheDefault) {
  const RandomCheckpoint checkpoint;
  checkpoint.WriteFile("head_clusters.json", R"({
    "clusters": {"0": [[0, 0], [1, 0]]}, "shared_clusters": ["0"],
    "thresholds": {"gamma": 0.8, "vertical_slash_gamma": 0.5, "tau": 0.3}})");
  EngineOptions options = CpuEngine(checkpoint);
  options.attention_overrides.tau = 0.25f;
  const auto engine = NewEngine(options);
  const AttentionOptions& attention = engine->info().default_attention;
  EXPECT_EQ(attention.gamma, 0.8f) << "of the cluster file";
  EXPECT_EQ(attention.vertical_slash_gamma, 0.5f) << "of the cluster file";
  EXPECT_EQ(attention.tau, 0.25f) << "of the operator";
  EXPECT_EQ(attention.coverage, AttentionOptions().coverage) << "of the program";
}

// Computing all queries of the last layer, or the last query alone, gives the same result.
TEST(PrefillEngine, TheLastLayerComputesNoMoreThanIsRead) {
  for (const bool with_biases : {false, true}) {
    ModelConfig config = SmallRandomConfig();
    if (with_biases) {
      config.family = Family::kQwen2;
      config.qkv_bias = true;
    }
    const RandomCheckpoint checkpoint(config);
    EngineOptions options = CpuEngine(checkpoint);
    options.tile_tokens = 48;
    const auto engine = NewEngine(options);
    for (const int64_t length : {1, 2, 48, 49, 127, 128, 129, 1000}) {
      const auto tokens = RandomTokens(length, config.vocab_size);
      const PromptRun narrow = RunPrompt(*engine, tokens, DenseAttention());
      const PromptRun whole = RunPrompts(*engine, {tokens}, DenseAttention()).front();
      EXPECT_LT(LargestDifference(narrow.logits, whole.logits), 1e-3) << length;
      for (size_t layer = 0; layer < narrow.kv.size(); ++layer) {
        EXPECT_LT(LargestDifference(narrow.kv[layer], whole.kv[layer]), 1e-3) << length;
      }
      EXPECT_EQ(narrow.reports.front().num_queries, length);
      EXPECT_EQ(narrow.reports.back().num_queries, 1);
      EXPECT_EQ(narrow.reports.back().dense_heads, length == 1 ? config.num_heads : 0);
      EXPECT_EQ(whole.reports.back().num_queries, length);
    }
  }
}

TEST(PrefillEngine, EveryFamilyRuns) {
  ModelConfig qwen2 = SmallRandomConfig();
  qwen2.family = Family::kQwen2;
  qwen2.qkv_bias = true;
  ModelConfig qwen3 = SmallRandomConfig();
  qwen3.family = Family::kQwen3;
  qwen3.qk_norm = true;
  qwen3.tied_embeddings = true;
  ModelConfig mistral = SmallRandomConfig();
  mistral.family = Family::kMistral;
  mistral.num_kv_heads = 4;
  ModelConfig wide_heads = SmallRandomConfig();
  wide_heads.head_dim = 128;
  for (const ModelConfig& config : {qwen2, qwen3, mistral, wide_heads}) {
    const RandomCheckpoint checkpoint(config);
    const auto engine = NewEngine(CpuEngine(checkpoint));
    ASSERT_NE(engine, nullptr);
    const PromptRun run =
        RunPrompt(*engine, RandomTokens(130, config.vocab_size), DenseAttention());
    ASSERT_EQ(run.logits.size(), static_cast<size_t>(config.vocab_size));
    for (float logit : run.logits) ASSERT_TRUE(std::isfinite(logit));
  }
}

}  // namespace
}  // namespace prefilld::model
