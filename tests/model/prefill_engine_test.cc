#include "model/prefill/prefill_engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

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

// The tiles of the wide projections are an implementation detail: cut differently, the same
// numbers come out up to the summation order of the GEMM.
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
  // None of them keeps the engine busy.
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
           {[](EngineOptions& o) { o.attention_overrides.tau = NAN; }, "attention.tau"},
       }) {
    EngineOptions options = CpuEngine(checkpoint_);
    change(options);
    const auto status = CreatePrefillEngine(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(message));
  }
}

TEST_F(PrefillEngineTest, OneSequenceAtATime) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  auto first = engine->Start({1, 2, 3}, DenseAttention());
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(engine->Start({1}, DenseAttention()).status().code(),
            absl::StatusCode::kFailedPrecondition);
  first->reset();
  EXPECT_TRUE(engine->Start({1}, DenseAttention()).ok());
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

bool Always() { return true; }

struct LogprobsCase {
  const char* name;
  int64_t vocab_size;
  int64_t tile_tokens;
  int64_t max_tokens;
  int num_tiles;  // of a prompt of max_tokens
};

class PrefillEngineLogprobs : public ::testing::TestWithParam<LogprobsCase> {};

TEST_P(PrefillEngineLogprobs, AreThoseOfTheLogitsOfEveryBeginning) {
  const LogprobsCase& c = GetParam();
  ModelConfig config = SmallRandomConfig();
  config.vocab_size = c.vocab_size;
  const RandomCheckpoint checkpoint(config);
  EngineOptions options = CpuEngine(checkpoint);
  options.tile_tokens = c.tile_tokens;
  options.max_tokens = c.max_tokens;
  const auto engine = NewEngine(options);
  const std::vector<uint32_t> tokens = RandomTokens(c.max_tokens, c.vocab_size);
  auto sequence = RunLayers(*engine, tokens, DenseAttention(), /*logprobs=*/true);
  int num_tiles = 0;
  const auto logprobs = sequence->Logprobs(0, [&num_tiles] { return ++num_tiles > 0; });
  ASSERT_TRUE(logprobs.ok()) << logprobs.status();
  sequence.reset();
  EXPECT_EQ(num_tiles, c.num_tiles);
  ASSERT_EQ(logprobs->of_token.size(), tokens.size() - 1);
  ASSERT_EQ(logprobs->of_best.size(), tokens.size() - 1);
  for (const size_t length :
       {size_t{1}, size_t{2}, size_t{15}, size_t{16}, size_t{17}, size_t{39}}) {
    if (length >= tokens.size()) continue;
    const std::vector<float> logits =
        RunPrompt(*engine, {tokens.begin(), tokens.begin() + length}, DenseAttention()).logits;
    double sum = 0.0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
    const double best = *std::max_element(logits.begin(), logits.end());
    EXPECT_NEAR(logprobs->of_token[length - 1], logits[tokens[length]] - std::log(sum), 1e-4)
        << length;
    EXPECT_NEAR(logprobs->of_best[length - 1], best - std::log(sum), 1e-4) << length;
  }
}

// 512 elements of wide activations a token: 2 tokens of 16 have room for their 3000 logits.
INSTANTIATE_TEST_SUITE_P(
    Tiles, PrefillEngineLogprobs,
    ::testing::Values(LogprobsCase{"AsWideAsALayers", 320, 16, 40, 3},
                      LogprobsCase{"NarrowedByTheVocabulary", 3000, 16, 40, 20},
                      LogprobsCase{"OfATokenWhoseLogitsOutgrowATile", 3000, 512, 3, 2}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_F(PrefillEngineTest, LogprobsStopWhenToldTo) {
  EngineOptions options = CpuEngine(checkpoint_);
  options.tile_tokens = 16;
  const auto engine = NewEngine(options);
  const auto sequence =
      RunLayers(*engine, RandomTokens(100, 320), DenseAttention(), /*logprobs=*/true);
  const auto logits = sequence->FinalLogits();
  int asked = 0;
  EXPECT_TRUE(absl::IsCancelled(sequence->Logprobs(0, [&asked] { return ++asked < 3; }).status()));
  EXPECT_EQ(asked, 3);
  EXPECT_TRUE(sequence->Logprobs(0, Always).ok());
  EXPECT_EQ(*sequence->FinalLogits(), *logits) << "the hidden states are as they were";
}

TEST_F(PrefillEngineTest, LogprobsNeedAllLayers) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  auto started = engine->Start(RandomTokens(40, 320), DenseAttention());
  ASSERT_TRUE(started.ok());
  ASSERT_TRUE((*started)->RunLayer().ok());
  EXPECT_EQ((*started)->Logprobs(0, Always).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(PrefillEngineTest, LogprobsMustBeAskedForAtTheStart) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  auto sequence = engine->Start(RandomTokens(40, 320), DenseAttention());
  ASSERT_TRUE(sequence.ok());
  for (int layer = 0; layer < checkpoint_.config().num_layers; ++layer) {
    ASSERT_TRUE((*sequence)->RunLayer().ok());
    (*sequence)->ReleaseKv(layer);
  }
  EXPECT_EQ((*sequence)->Logprobs(0, Always).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(PrefillEngineTest, APromptOfOneTokenHasNoLogprobs) {
  const auto engine = NewEngine(CpuEngine(checkpoint_));
  const auto logprobs =
      RunLayers(*engine, {7}, DenseAttention(), /*logprobs=*/true)->Logprobs(0, Always);
  ASSERT_TRUE(logprobs.ok()) << logprobs.status();
  EXPECT_TRUE(logprobs->of_token.empty());
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

// {"0": [[0, 0]], "1": [[0, 1]], ...}: every head of the model, alone or all in one.
std::string ClusterFile(const ModelConfig& config, bool alone) {
  std::vector<std::string> heads, clusters, names;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (int head = 0; head < config.num_heads; ++head) {
      heads.push_back(absl::StrCat("[", layer, ",", head, "]"));
      names.push_back(absl::StrCat("\"", names.size(), "\""));
      clusters.push_back(absl::StrCat(names.back(), ": [", heads.back(), "]"));
    }
  }
  if (!alone) {
    names = {"\"all\""};
    clusters = {absl::StrCat("\"all\": [", absl::StrJoin(heads, ","), "]")};
  }
  return absl::StrCat("{\"clusters\": {", absl::StrJoin(clusters, ","), "}, \"shared_clusters\": [",
                      absl::StrJoin(names, ","), "]}");
}

TEST(PrefillEngine, ShareWithEveryHeadAloneEqualsDenseBitForBit) {
  const RandomCheckpoint checkpoint;
  checkpoint.WriteFile("head_clusters.json", ClusterFile(checkpoint.config(), /*alone=*/true));
  const auto engine = NewEngine(CpuEngine(checkpoint));
  const auto tokens = RandomTokens(1000, 320);
  AttentionOptions share;
  share.policy = AttentionPolicy::kShare;
  const PromptRun dense = RunPrompt(*engine, tokens, DenseAttention());
  const PromptRun shared = RunPrompt(*engine, tokens, share);
  EXPECT_EQ(shared.kv, dense.kv);
  EXPECT_EQ(shared.logits, dense.logits);
  for (const LayerReport& report : shared.reports) {
    const bool is_last = report.layer + 1 == checkpoint.config().num_layers;
    EXPECT_EQ(report.pivot_heads, is_last ? 0 : checkpoint.config().num_heads);
    EXPECT_EQ(report.density, 1.0);
  }
}

TEST(PrefillEngine, OnePivotServesItsClusterInAllLayers) {
  const RandomCheckpoint checkpoint;
  checkpoint.WriteFile("head_clusters.json", ClusterFile(checkpoint.config(), /*alone=*/false));
  const auto engine = NewEngine(CpuEngine(checkpoint));
  AttentionOptions share;
  share.policy = AttentionPolicy::kShare;
  share.tau = 1.0f;
  share.coverage = 1.0f;
  share.gamma = 0.3f;
  share.min_budget_tokens = 0;
  const PromptRun run = RunPrompt(*engine, RandomTokens(1000, 320), share);
  EXPECT_EQ(run.reports[0].pivot_heads, 1);
  EXPECT_EQ(run.reports[0].shared_heads, checkpoint.config().num_heads - 1);
  for (int layer = 1; layer + 1 < checkpoint.config().num_layers; ++layer) {
    EXPECT_EQ(run.reports[layer].shared_heads, checkpoint.config().num_heads);
    EXPECT_LT(run.reports[layer].density, 1.0);
  }
}

// All of the last layer and the last query alone give the same; dense, the same as before.
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

TEST(PrefillEngine, TheLastQueryOfASparsePromptIsExact) {
  const RandomCheckpoint checkpoint;
  const auto engine = NewEngine(CpuEngine(checkpoint));
  AttentionOptions sparse;
  sparse.policy = AttentionPolicy::kVerticalSlash;
  sparse.gamma = 0.3f;
  sparse.min_budget_tokens = 0;
  const auto tokens = RandomTokens(1000, 320);
  const PromptRun narrow = RunPrompt(*engine, tokens, sparse);
  const LayerReport& last = narrow.reports.back();
  EXPECT_EQ(last.dense_heads + last.vertical_slash_heads, 0);
  EXPECT_EQ(last.num_queries, 1);
  EXPECT_EQ(last.density, 1.0);
  EXPECT_EQ(narrow.reports.front().vertical_slash_heads, checkpoint.config().num_heads);
  const PromptRun whole = RunPrompts(*engine, {tokens}, sparse).front();
  EXPECT_EQ(whole.reports.back().vertical_slash_heads, checkpoint.config().num_heads);
  EXPECT_EQ(narrow.kv, whole.kv) << "only the last layer's output depends on its attention";
}

TEST(PrefillEngine, BaselinePoliciesRunWhereRoomWasMadeForThem) {
  const RandomCheckpoint checkpoint;
  EngineOptions with_baselines = CpuEngine(checkpoint);
  with_baselines.baselines = true;
  const auto plain = NewEngine(CpuEngine(checkpoint));
  const auto engine = NewEngine(with_baselines);
  const auto tokens = RandomTokens(1000, 320);
  for (const AttentionPolicy policy :
       {AttentionPolicy::kBaselineQueryAware, AttentionPolicy::kBaselineRandom}) {
    AttentionOptions options;
    options.policy = policy;
    options.tau = 1.0f;
    const auto refused = plain->Start(tokens, options);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(refused.status().message(), HasSubstr(Name(policy)));

    const PromptRun run = RunPrompt(*engine, tokens, options);
    for (const LayerReport& report : run.reports) {
      const bool is_last = report.layer + 1 == checkpoint.config().num_layers;
      EXPECT_EQ(report.baseline_heads, is_last ? 0 : checkpoint.config().num_heads);
      EXPECT_LE(report.density, 1.0);
    }
  }
}

TEST(PrefillEngine, AuditedPromptsGiveTheSameResultAndTheRecallOfEverySparseHead) {
  const RandomCheckpoint checkpoint;
  checkpoint.WriteFile("head_clusters.json", ClusterFile(checkpoint.config(), /*alone=*/false));
  const auto engine = NewEngine(CpuEngine(checkpoint));
  const auto tokens = RandomTokens(1000, 320);
  AttentionOptions options;
  options.policy = AttentionPolicy::kShare;
  options.gamma = 0.5f;
  const PromptRun unseen = RunPrompt(*engine, tokens, options);
  options.recall_audit_rows = 3;
  const PromptRun audited = RunPrompt(*engine, tokens, options);
  EXPECT_EQ(audited.logits, unseen.logits);
  for (const LayerReport& report : audited.reports) {
    EXPECT_EQ(static_cast<int>(report.recall.size()),
              report.shared_heads + report.vertical_slash_heads);
    for (const HeadRecall& head : report.recall) {
      EXPECT_EQ(head.layer, report.layer);
      EXPECT_GT(head.recall, 0.0f);
      EXPECT_LE(head.recall, 1.0001f);
    }
  }
}

TEST(PrefillEngine, AutoIsDenseForShortPromptsAndForModelsWithoutClusters) {
  const RandomCheckpoint plain, clustered;
  clustered.WriteFile("head_clusters.json", ClusterFile(clustered.config(), /*alone=*/false));
  AttentionOptions options;
  options.crossover_tokens = 600;
  const auto policy = [&](const RandomCheckpoint& checkpoint, int64_t length) {
    const auto engine = NewEngine(CpuEngine(checkpoint));
    return (*engine->Start(RandomTokens(length, 320), options))->policy();
  };
  EXPECT_EQ(policy(plain, 700), AttentionPolicy::kDense);
  EXPECT_EQ(policy(clustered, 700), AttentionPolicy::kShare);
  EXPECT_EQ(policy(clustered, 500), AttentionPolicy::kDense);
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
