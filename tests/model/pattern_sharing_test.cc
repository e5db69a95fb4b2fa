#include "model/sparse/pattern_sharing.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace prefilld::model {
namespace {

constexpr int kHeadDim = 64;
constexpr int kBlockTokens = 64;
constexpr int kNumHeads = 4;
constexpr float kStrength = 12.0f;  // logit of a key that a query looks for

// The kinds of heads. kTopics follows content: the prompt consists of segments, each about one
// topic, and a query attends to all earlier segments about its own topic. These are few blocks, in
// different places for every query block, so that the last block's columns and diagonals say little
// about the others. kSinkAndLocal attends to the first token and the neighbourhood, which
// vertical-slash covers. kNeedle attends to one key from everywhere, and else to its own block.
enum class Structure { kTopics, kSinkAndLocal, kNeedle };

// One layer of one prompt on the CPU, with all heads in one cluster unless a test says otherwise.
class Layer {
 public:
  // `structure` and `topic_seed` are per head. Heads with the same topic seed see the same topics.
  Layer(int64_t num_tokens, const std::vector<Structure>& structure,
        const std::vector<int>& topic_seed)
      : num_tokens_(num_tokens) {
    config_.num_layers = 2;
    config_.num_heads = kNumHeads;
    config_.num_kv_heads = kNumHeads;
    config_.head_dim = kHeadDim;
    clusters_.num_clusters = 1;
    clusters_.cluster_of.assign(2, std::vector<int>(kNumHeads, 0));
    auto device = CreateDevice(DeviceChoice::kCpu, 2);
    EXPECT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
    const size_t count = num_tokens * kNumHeads * kHeadDim;
    q_.assign(count, 0.0f);
    k_.assign(count, 0.0f);
    v_.resize(count);
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (float& value : v_) value = normal(random);
    for (int head = 0; head < kNumHeads; ++head) {
      switch (structure[head]) {
        case Structure::kTopics:
          FillTopics(head, topic_seed[head]);
          break;
        case Structure::kSinkAndLocal:
          FillSinkAndLocal(head);
          break;
        case Structure::kNeedle:
          FillNeedle(head);
          break;
      }
    }
  }

  HeadClusters& clusters() { return clusters_; }
  void RemoveClusters() {
    clusters_.num_clusters = 0;
    clusters_.cluster_of.assign(2, std::vector<int>(kNumHeads, HeadClusters::kNoCluster));
  }

  // Computes the attention of layers 0 .. num_layers - 1 on the same inputs, and returns the output
  // and report of the last one.
  std::vector<float> Attend(const AttentionOptions& options, LayerReport* report,
                            int num_layers = 1) {
    const auto workspace = SharingWorkspace::Create(device_.get(), &config_, &clusters_,
                                                    num_tokens_ + 100, kBlockTokens);
    EXPECT_TRUE(workspace.ok()) << workspace.status();
    auto sharing = PatternSharing::Create(workspace->get(), num_tokens_ + 100);
    EXPECT_TRUE(sharing.ok()) << sharing.status();
    (*sharing)->StartPrompt(num_tokens_, options);
    std::vector<float> out;
    for (int layer = 0; layer < num_layers; ++layer) {
      *report = LayerReport();
      out = q_;
      EXPECT_TRUE((*sharing)->Attend(layer, Params(&out), report).ok());
      EXPECT_TRUE((*sharing)->Report(report).ok());
    }
    return out;
  }

  std::vector<float> AttendDense() {
    std::vector<float> out = q_;
    kernels::AttentionParams params = Params(&out);
    std::vector<kernels::HeadWork> work(kNumHeads);
    for (int head = 0; head < kNumHeads; ++head) work[head].head = head;
    params.work = work.data();
    params.num_work = kNumHeads;
    EXPECT_TRUE(device_->ops().Attention(params).ok());
    return out;
  }

 private:
  float* Q(int64_t token, int head) { return &q_[(token * kNumHeads + head) * kHeadDim]; }
  float* K(int64_t token, int head) { return &k_[(head * num_tokens_ + token) * kHeadDim]; }

  void FillTopics(int head, int seed) {
    std::mt19937 random(seed);
    const float length = std::sqrt(kStrength * std::sqrt(static_cast<float>(kHeadDim)));
    for (int64_t first = 0; first < num_tokens_; first += kBlockTokens) {
      const int topic = static_cast<int>(random() % 12);
      for (int64_t t = first; t < std::min(first + kBlockTokens, num_tokens_); ++t) {
        Q(t, head)[topic] = length;
        K(t, head)[topic] = length;
      }
    }
  }

  // Puts half of the mass on token 0. The rest falls off with distance, by angles that turn slowly.
  void FillSinkAndLocal(int head) {
    const float length = std::sqrt(kStrength * std::sqrt(static_cast<float>(kHeadDim)));
    for (int64_t t = 0; t < num_tokens_; ++t) {
      const float angle = static_cast<float>(t) * 0.02f;
      Q(t, head)[0] = K(t, head)[0] = length * std::cos(angle);
      Q(t, head)[1] = K(t, head)[1] = length * std::sin(angle);
      Q(t, head)[2] = length;
    }
    std::fill_n(K(0, head), 3, 0.0f);
    K(0, head)[2] = 1.6f * length;
  }

  // Every key of a query's own block has logit 8, and the needle 16. Nearly all mass is the
  // needle's. The mean over eight keys hides it: there its logit is 2.
  void FillNeedle(int head) {
    constexpr int kNeedleAxis = kHeadDim - 1;
    for (int64_t t = 0; t < num_tokens_; ++t) {
      const auto own_axis = t / kBlockTokens % kNeedleAxis;
      Q(t, head)[own_axis] = K(t, head)[own_axis] = 8.0f;
      Q(t, head)[kNeedleAxis] = 16.0f;
    }
    K(num_tokens_ / 3, head)[kNeedleAxis] = 8.0f;
  }

  kernels::AttentionParams Params(std::vector<float>* out) {
    return {.q = out->data(),
            .k = k_.data(),
            .v = v_.data(),
            .out = out->data(),
            .num_queries = num_tokens_,
            .num_keys = num_tokens_,
            .kv_head_stride = num_tokens_ * kHeadDim,
            .num_heads = kNumHeads,
            .num_kv_heads = kNumHeads,
            .head_dim = kHeadDim,
            .block_tokens = kBlockTokens,
            .scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim))};
  }

  const int64_t num_tokens_;
  ModelConfig config_;
  HeadClusters clusters_;
  std::unique_ptr<Device> device_;
  std::vector<float> q_, k_, v_;
};

// Returns ||out - dense|| / ||dense|| of one head.
double HeadError(const std::vector<float>& out, const std::vector<float>& dense, int head) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    if (static_cast<int>(i / kHeadDim % kNumHeads) != head) continue;
    difference += (out[i] - dense[i]) * (out[i] - dense[i]);
    norm += dense[i] * dense[i];
  }
  return std::sqrt(difference / norm);
}

AttentionOptions Options(AttentionPolicy policy) {
  AttentionOptions options;
  options.policy = policy;
  options.min_budget_tokens = 128;
  return options;
}

const std::vector<Structure> kAllTopics(kNumHeads, Structure::kTopics);
const std::vector<int> kSameTopics(kNumHeads, 1);

TEST(PatternSharing, KeepsWhatVerticalSlashLosesWhereAttentionFollowsContent) {
  for (int64_t num_tokens : {4096, 4000}) {
    Layer layer(num_tokens, kAllTopics, kSameTopics);
    const auto dense = layer.AttendDense();
    LayerReport report;
    const auto shared = layer.Attend(Options(AttentionPolicy::kShare), &report);
    EXPECT_EQ(report.pivot_heads, 1);
    EXPECT_EQ(report.shared_heads, 3);
    EXPECT_GT(report.density, 0.25);
    EXPECT_LT(report.density, 0.25 + 0.75 * 0.2);
    EXPECT_EQ(HeadError(shared, dense, 0), 0.0) << "the pivot is exact";
    for (int head = 1; head < kNumHeads; ++head) EXPECT_LT(HeadError(shared, dense, head), 0.3);

    const auto vertical_slash = layer.Attend(Options(AttentionPolicy::kVerticalSlash), &report);
    EXPECT_EQ(report.vertical_slash_heads, kNumHeads);
    EXPECT_EQ(report.pivot_heads, 0);
    EXPECT_LT(report.density, 0.5);
    for (int head = 0; head < kNumHeads; ++head) {
      EXPECT_GT(HeadError(vertical_slash, dense, head), 0.5);
    }
  }
}

// Without clusters nothing is shared. Scores in which every query has a say find what the last
// queries cannot know: they see the topics of their own block alone.
TEST(PatternSharing, WithoutClustersEveryHeadIsScoredAndFollowsContent) {
  for (const int64_t stride : {8, 16}) {
    Layer layer(4000, kAllTopics, {1, 2, 3, 4});
    layer.RemoveClusters();
    const auto dense = layer.AttendDense();
    AttentionOptions options = Options(AttentionPolicy::kShare);
    options.score_stride = stride;
    options.last_rows_gamma = 0.1f;
    options.min_budget_tokens = 0;
    LayerReport report;
    const auto out = layer.Attend(options, &report);
    EXPECT_EQ(report.scored_heads, kNumHeads);
    EXPECT_EQ(report.pivot_heads + report.shared_heads + report.vertical_slash_heads, 0);
    EXPECT_LT(report.density, 0.3);
    for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);

    options.score_threshold = 0.01f;
    const auto without_scores = layer.Attend(options, &report);
    for (int head = 0; head < kNumHeads; ++head) {
      EXPECT_GT(HeadError(without_scores, dense, head), 0.35);
    }
  }
}

// Averages hide a single key, which the last queries' columns show.
TEST(PatternSharing, ScoredHeadsSeeTheSingleKeysThatTheirLastQueriesLookFor) {
  Layer layer(4000, std::vector<Structure>(kNumHeads, Structure::kNeedle), kSameTopics);
  layer.RemoveClusters();
  const auto dense = layer.AttendDense();
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.min_budget_tokens = 0;
  LayerReport report;
  const auto out = layer.Attend(options, &report);
  EXPECT_LT(report.density, 0.2);
  for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);
}

TEST(PatternSharing, ScoredHeadsComputeMoreWhereTheirThresholdsAreHigher) {
  Layer layer(4096, kAllTopics, {1, 2, 3, 4});
  layer.RemoveClusters();
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.score_threshold = 0.5f;
  options.last_rows_gamma = 0.1f;
  options.min_budget_tokens = 0;
  LayerReport low, scores, last_rows;
  layer.Attend(options, &low);
  options.score_threshold = 0.95f;
  layer.Attend(options, &scores);
  EXPECT_GT(scores.density, low.density);
  options.score_threshold = 0.5f;
  options.last_rows_gamma = 0.9f;
  layer.Attend(options, &last_rows);
  EXPECT_GT(last_rows.density, low.density);
}

TEST(PatternSharing, AMemberThatLooksElsewhereIsScored) {
  Layer layer(4096, kAllTopics, {1, 1, 2, 1});
  LayerReport report;
  layer.Attend(Options(AttentionPolicy::kShare), &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.shared_heads, 2);
  EXPECT_EQ(report.scored_heads, 1);
}

TEST(PatternSharing, VerticalSlashHasAGammaOfItsOwn) {
  Layer layer(4096, kAllTopics, kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kVerticalSlash);
  options.min_budget_tokens = 0;
  LayerReport plain, own;
  options.gamma = 0.3f;
  const auto low = layer.Attend(options, &plain);
  options.gamma = 0.9f;
  layer.Attend(options, &own);
  EXPECT_GT(own.density, plain.density);
  options.vertical_slash_gamma = 0.3f;
  EXPECT_EQ(layer.Attend(options, &own), low);
  EXPECT_EQ(own.density, plain.density);

  // Patterns of pivots are still cut at gamma.
  options = Options(AttentionPolicy::kShare);
  const auto shared = layer.Attend(options, &plain);
  options.vertical_slash_gamma = 0.3f;
  EXPECT_EQ(layer.Attend(options, &own), shared);
  EXPECT_EQ(own.shared_heads, 3);
  options.gamma = 0.3f;
  layer.Attend(options, &own);
  EXPECT_LT(own.density, plain.density);
}

// At gamma 1 the pattern holds every block and so does vertical-slash, which then follows each
// head by itself at no greater cost.
TEST(PatternSharing, AClusterThatVerticalSlashCoversAtEqualCostDoesNotShare) {
  Layer layer(4096, std::vector<Structure>(kNumHeads, Structure::kSinkAndLocal), kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.gamma = 1.0f;
  const auto dense = layer.AttendDense();
  LayerReport report;
  const auto out = layer.Attend(options, &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.scored_heads, 3);
  for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);

  options.coverage = 1.0f;
  layer.Attend(options, &report);
  EXPECT_EQ(report.shared_heads, 3);
}

TEST(PatternSharing, ALayerWhoseClustersGainNothingIsAsWithoutClustersBitForBit) {
  Layer layer(4096, std::vector<Structure>(kNumHeads, Structure::kSinkAndLocal), kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.gamma = 1.0f;
  LayerReport report;
  const auto out = layer.Attend(options, &report, /*num_layers=*/2);
  EXPECT_EQ(report.pivot_heads, 0);
  EXPECT_EQ(report.shared_heads, 0);
  EXPECT_EQ(report.scored_heads, kNumHeads);
  layer.RemoveClusters();
  LayerReport scored;
  EXPECT_EQ(layer.Attend(options, &scored), out);
  EXPECT_EQ(scored.density, report.density);
}

// A large budget floor makes vertical-slash cover everything, at the cost of all blocks.
TEST(PatternSharing, AClusterThatVerticalSlashCoversOnlyAtGreaterCostShares) {
  Layer layer(4096, kAllTopics, kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.min_budget_tokens = 4096;
  LayerReport report;
  layer.Attend(options, &report);
  EXPECT_EQ(report.shared_heads, 3);
}

TEST(PatternSharing, SharedHeadsSeeWhatTheirOwnLastQueriesLookFor) {
  Layer layer(4096, kAllTopics, {1, 2, 1, 1});
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.tau = 1.0f;  // head 1 shares though it looks elsewhere
  const auto dense = layer.AttendDense();
  LayerReport report;
  const auto out = layer.Attend(options, &report);
  ASSERT_EQ(report.shared_heads, 3);
  EXPECT_GT(HeadError(out, dense, 1), 0.5);
  const std::ptrdiff_t last_block = kBlockTokens * kNumHeads * kHeadDim;
  EXPECT_LT(
      HeadError({out.end() - last_block, out.end()}, {dense.end() - last_block, dense.end()}, 1),
      0.3);
}

TEST(PatternSharing, WithoutSameLayerSharingItBeginsOneLayerLater) {
  Layer layer(4096, kAllTopics, kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.same_layer_sharing = false;
  LayerReport report;
  layer.Attend(options, &report, /*num_layers=*/1);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.scored_heads, 3);
  layer.Attend(options, &report, /*num_layers=*/2);
  EXPECT_EQ(report.pivot_heads, 0);
  EXPECT_EQ(report.shared_heads, 4);
}

TEST(PatternSharing, HeadsOutsideSharedClustersAreScored) {
  Layer layer(4096, kAllTopics, kSameTopics);
  layer.clusters().cluster_of[0] = {HeadClusters::kNoCluster, 0, HeadClusters::kNoCluster, 0};
  LayerReport report;
  layer.Attend(Options(AttentionPolicy::kShare), &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.shared_heads, 1);
  EXPECT_EQ(report.scored_heads, 2);
}

TEST(PatternSharing, ThresholdsThatForceEveryBlockGiveDenseBitForBit) {
  Layer layer(1000, kAllTopics, kSameTopics);
  const auto dense = layer.AttendDense();
  LayerReport report;
  AttentionOptions whole = Options(AttentionPolicy::kVerticalSlash);
  whole.min_budget_tokens = 1000;
  EXPECT_EQ(layer.Attend(whole, &report), dense);
  EXPECT_EQ(report.density, 1.0);
}

TEST(PatternSharing, EveryHeadAloneInAClusterIsItsPivotAndDenseBitForBit) {
  Layer layer(1000, kAllTopics, kSameTopics);
  layer.clusters().num_clusters = kNumHeads;
  layer.clusters().cluster_of[0] = {0, 1, 2, 3};
  const auto dense = layer.AttendDense();
  LayerReport report;
  EXPECT_EQ(layer.Attend(Options(AttentionPolicy::kShare), &report), dense);
  EXPECT_EQ(report.pivot_heads, kNumHeads);
  EXPECT_EQ(report.density, 1.0);
}

TEST(PatternSharing, WhereNoPivotFormsItIsAsWithoutClustersBitForBit) {
  Layer layer(2000, kAllTopics, kSameTopics);
  LayerReport plain, share;
  AttentionOptions sparse_excluded = Options(AttentionPolicy::kShare);
  sparse_excluded.delta = 0.0f;
  const auto excluded = layer.Attend(sparse_excluded, &share);
  AttentionOptions never = Options(AttentionPolicy::kShare);
  never.coverage = 0.0f;
  const auto not_covered = layer.Attend(never, &share);
  EXPECT_EQ(share.scored_heads, kNumHeads);
  layer.RemoveClusters();
  const auto expected = layer.Attend(Options(AttentionPolicy::kShare), &plain);
  EXPECT_EQ(excluded, expected);
  EXPECT_EQ(not_covered, expected);
  EXPECT_EQ(share.density, plain.density);
}

// A pivot beside scored heads changes nothing for them.
TEST(PatternSharing, WithTauZeroItIsScoredHeadsPlusPivots) {
  Layer layer(2000, kAllTopics, kSameTopics);
  LayerReport report;
  const auto dense = layer.AttendDense();
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.tau = 0.0f;
  const auto out = layer.Attend(options, &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(HeadError(out, dense, 0), 0.0);
  layer.RemoveClusters();
  const auto scored = layer.Attend(options, &report);
  for (int head = 1; head < kNumHeads; ++head) EXPECT_EQ(HeadError(out, scored, head), 0.0);
}

TEST(PatternSharing, APromptInheritsNothingFromTheOneBefore) {
  ModelConfig config;
  config.num_layers = 1;
  config.num_heads = config.num_kv_heads = 1;
  config.head_dim = kHeadDim;
  HeadClusters clusters;
  clusters.num_clusters = 1;
  clusters.cluster_of = {{0}};
  const auto device = *CreateDevice(DeviceChoice::kCpu, 1);
  const auto workspace = *SharingWorkspace::Create(device.get(), &config, &clusters, 512, 64);
  const auto sharing = *PatternSharing::Create(workspace.get(), 512);
  for (int64_t num_tokens : {512, 300, 512}) {
    std::vector<float> zeros(num_tokens * kHeadDim, 0.0f), out(zeros);
    kernels::AttentionParams params = {.q = zeros.data(),
                                       .k = zeros.data(),
                                       .v = zeros.data(),
                                       .out = out.data(),
                                       .num_queries = num_tokens,
                                       .num_keys = num_tokens,
                                       .kv_head_stride = num_tokens * kHeadDim,
                                       .num_heads = 1,
                                       .num_kv_heads = 1,
                                       .head_dim = kHeadDim,
                                       .block_tokens = 64,
                                       .scale = 1.0f};
    sharing->StartPrompt(num_tokens, Options(AttentionPolicy::kShare));
    LayerReport report;
    ASSERT_TRUE(sharing->Attend(0, params, &report).ok());
    ASSERT_TRUE(sharing->Report(&report).ok());
    EXPECT_EQ(report.pivot_heads, 1) << num_tokens;
  }
}

}  // namespace
}  // namespace prefilld::model
