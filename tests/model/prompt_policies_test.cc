// Attention policies of whole prompts through the engine.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/prefill/crossover.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/pattern_sharing.h"
#include "model/sparse/sharing_workspace.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

using ::testing::HasSubstr;

TEST(PromptPolicies, ShareWithEveryHeadAloneEqualsDenseBitForBit) {
  const RandomCheckpoint checkpoint;
  checkpoint.WriteFile("head_clusters.json", ClusterFile(checkpoint.config(), /*alone=*/true));
  const auto engine = NewEngine(CpuEngineOptions(checkpoint.dir(), 1200));
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

TEST(PromptPolicies, OnePivotServesItsClusterInAllLayers) {
  const RandomCheckpoint checkpoint;
  checkpoint.WriteFile("head_clusters.json", ClusterFile(checkpoint.config(), /*alone=*/false));
  const auto engine = NewEngine(CpuEngineOptions(checkpoint.dir(), 1200));
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

TEST(PromptPolicies, TheLastQueryOfASparsePromptIsExact) {
  const RandomCheckpoint checkpoint;
  const auto engine = NewEngine(CpuEngineOptions(checkpoint.dir(), 1200));
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

TEST(PromptPolicies, BaselinePoliciesRunWhereRoomWasMadeForThem) {
  const RandomCheckpoint checkpoint;
  EngineOptions with_baselines = CpuEngineOptions(checkpoint.dir(), 1200);
  with_baselines.baselines = true;
  const auto plain = NewEngine(CpuEngineOptions(checkpoint.dir(), 1200));
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

TEST(PromptPolicies, AuditedPromptsGiveTheSameResultAndTheRecallOfEverySparseHead) {
  const RandomCheckpoint checkpoint;
  checkpoint.WriteFile("head_clusters.json", ClusterFile(checkpoint.config(), /*alone=*/false));
  const auto engine = NewEngine(CpuEngineOptions(checkpoint.dir(), 1200));
  const auto tokens = RandomTokens(1000, 320);
  AttentionOptions options;
  options.policy = AttentionPolicy::kShare;
  options.gamma = 0.5f;
  const PromptRun unseen = RunPrompt(*engine, tokens, options);
  options.recall_audit_rows = 3;
  const PromptRun audited = RunPrompt(*engine, tokens, options);
  EXPECT_EQ(audited.logits, unseen.logits);
  for (const LayerReport& report : audited.reports) {
    EXPECT_EQ(static_cast<int>(report.recall.size()), report.shared_heads + report.scored_heads);
    for (const HeadRecall& head : report.recall) {
      EXPECT_EQ(head.layer, report.layer);
      EXPECT_GT(head.recall, 0.0f);
      EXPECT_LE(head.recall, 1.0001f);
    }
  }
}

TEST(PromptPolicies, AutoIsDenseForShortPromptsWithAndWithoutClusters) {
  const RandomCheckpoint plain, clustered;
  clustered.WriteFile("head_clusters.json", ClusterFile(clustered.config(), /*alone=*/false));
  AttentionOptions options;
  options.crossover_tokens = 600;
  const auto policy = [&](const RandomCheckpoint& checkpoint, int64_t length) {
    const auto engine = NewEngine(CpuEngineOptions(checkpoint.dir(), 1200));
    return (*engine->Start(RandomTokens(length, 320), options))->policy();
  };
  EXPECT_EQ(policy(plain, 700), AttentionPolicy::kShare);
  EXPECT_EQ(policy(plain, 500), AttentionPolicy::kDense);
  EXPECT_EQ(policy(clustered, 700), AttentionPolicy::kShare);
  EXPECT_EQ(policy(clustered, 500), AttentionPolicy::kDense);
}

TEST(PromptPolicies, TheCrossoverIsMeasuredUnlessTheOperatorNamesIt) {
  const RandomCheckpoint checkpoint;
  EngineOptions options = CpuEngineOptions(checkpoint.dir(), 1200);
  const int64_t measured = NewEngine(options)->info().default_attention.crossover_tokens;
  EXPECT_GE(measured, 512);
  EXPECT_LE(measured, 1201);
  options.attention_overrides.crossover_tokens = 777;
  EXPECT_EQ(NewEngine(options)->info().default_attention.crossover_tokens, 777);
}

TEST(MeasureAttention, RunsBothWaysOverNoiseAtADensityOfRealText) {
  constexpr int64_t kTokens = 2100;
  ModelConfig config;
  config.num_layers = 1;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  HeadClusters clusters;
  clusters.cluster_of.assign(1, std::vector<int>(4, HeadClusters::kNoCluster));
  const auto device = CreateDevice(DeviceChoice::kCpu, 2);
  ASSERT_TRUE(device.ok()) << device.status();
  const auto workspace =
      SharingWorkspace::Create(device->get(), &config, &clusters, kTokens, /*block_tokens=*/128);
  ASSERT_TRUE(workspace.ok()) << workspace.status();
  const auto sharing = PatternSharing::Create(workspace->get(), kTokens);
  ASSERT_TRUE(sharing.ok()) << sharing.status();
  std::vector<float> q(kTokens * 4 * 64), k(kTokens * 2 * 64), v(k.size()), out(q.size());
  const auto measured = MeasureAttention(workspace->get(), sharing->get(),
                                         {.q = q.data(),
                                          .k = k.data(),
                                          .v = v.data(),
                                          .out = out.data(),
                                          .num_queries = kTokens,
                                          .num_keys = kTokens,
                                          .kv_head_stride = kTokens * 64,
                                          .num_heads = 4,
                                          .num_kv_heads = 2,
                                          .head_dim = 64,
                                          .block_tokens = 128,
                                          .scale = 0.125f},
                                         AttentionOptions());
  ASSERT_TRUE(measured.ok()) << measured.status();
  ASSERT_FALSE(measured->empty());
  const double least[] = {0.80, 0.67, 0.55};
  const double most[] = {1.0, 0.9, 0.75};
  for (size_t i = 0; i < measured->size(); ++i) {
    EXPECT_EQ((*measured)[i].num_tokens, 512 << i);
    EXPECT_GE((*measured)[i].density, least[i]);
    EXPECT_LE((*measured)[i].density, most[i]);
    EXPECT_GT((*measured)[i].dense_us, 0.0);
    EXPECT_GT((*measured)[i].share_us, 0.0);
  }
  for (const std::vector<float>& noise : {q, k, v}) {
    double sum = 0.0, squares = 0.0;
    for (int i = 0; i < 512 * 64; ++i) {
      sum += noise[i];
      squares += noise[i] * noise[i];
    }
    EXPECT_NEAR(sum / (512 * 64), 0.0, 0.05);
    EXPECT_NEAR(squares / (512 * 64), 1.0, 0.05);
  }
}

TEST(CrossoverOf, LiesWhereTheTimesAreEqual) {
  // Dense attention grows with the square, share with a part of it and something fixed.
  std::vector<AttentionTimes> measured;
  for (const double n : {512.0, 1024.0, 2048.0, 4096.0}) {
    measured.push_back({static_cast<int64_t>(n), n * n, 0.6 * n * n + 0.4 * 1800.0 * 1800.0});
  }
  const int64_t crossover = CrossoverOf(measured, 100000);
  EXPECT_GT(crossover, 1600);
  EXPECT_LT(crossover, 2000);
  const int64_t guess = CrossoverOf(absl::MakeConstSpan(measured).first(2), 100000);
  EXPECT_GT(guess, 1800) << "a guess is on the side of dense";
  EXPECT_LT(guess, 2400);
  EXPECT_EQ(CrossoverOf(absl::MakeConstSpan(measured).first(2), 1500), 1501) << "never faster";
  EXPECT_EQ(CrossoverOf(absl::MakeConstSpan(measured).subspan(2), 3000), 2048) << "always faster";
  EXPECT_EQ(CrossoverOf({}, 400), 401) << "nothing was measured";
}

}  // namespace
}  // namespace prefilld::model
