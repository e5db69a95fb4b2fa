// Tests how a layer's attention is divided, and that the parts together give the bits of the whole.
#include "model/sparse/attention_parts.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "model/sparse/pattern_sharing.h"
#include "tests/model/one_layer.h"

namespace prefilld::model {
namespace {

using kernels::AttentionParams;
using kernels::HeadWork;

class CountedPauses final : public LayerPauses {
 public:
  explicit CountedPauses(int64_t most_work) : most_work_(most_work) {}
  absl::Status Reach(LayerStage stage) override {
    ++count_[static_cast<size_t>(stage)];
    return absl::OkStatus();
  }
  int64_t most_attention_work() const override { return most_work_; }
  int count(LayerStage stage) const { return count_[static_cast<size_t>(stage)]; }

 private:
  const int64_t most_work_;
  int count_[kNumLayerStages] = {};
};

// The attention that is divided is that of Qwen2.5-7B.
constexpr int kHeads = 28, kBlock = 128, kHeadDim = 128;
constexpr DeviceTraits H200() {
  return {.compute_dtype = kernels::DType::kBf16, .asynchronous = true, .parallel_tiles = 132};
}

// A part that was found: its query blocks by absolute position.
struct Part {
  int first_head, num_heads;
  int64_t first_block, num_blocks;
  int64_t pairs = 0;  // of a query block and a key block, of all heads, as if they were dense
};

std::vector<Part> Divide(int64_t num_queries, int64_t num_keys, bool sparse,
                         const DeviceTraits& device = H200()) {
  uint32_t pattern = 0;  // its address stands for one; nothing is read
  std::vector<HeadWork> work(kHeads);
  for (int head = 0; head < kHeads; ++head) {
    work[head] = {.head = head, .pattern = sparse ? &pattern : nullptr};
  }
  CountedPauses pauses(/*most_work=*/0);
  AttentionParts parts(device, &pauses,
                       {.num_queries = num_queries,
                        .num_keys = num_keys,
                        .num_heads = kHeads,
                        .num_kv_heads = 4,
                        .head_dim = kHeadDim,
                        .block_tokens = kBlock},
                       work);
  std::vector<Part> found;
  while (parts.Next()) {
    const AttentionParams& p = parts.params();
    Part part = {p.work[0].head, p.num_work, FirstQueryBlock(p), NumQueryBlocks(p)};
    for (int64_t row = 0; row < part.num_blocks; ++row) {
      part.pairs += p.num_work * (part.first_block + row + 1);
    }
    found.push_back(part);
  }
  return found;
}

TEST(AttentionParts, CoverEveryHeadAndQueryBlockOnce) {
  for (const bool sparse : {false, true}) {
    const int64_t num_keys = 1'000'000, num_queries = 900'000, blocks = 7813;
    std::vector<int> covered(kHeads * blocks);
    for (const Part& part : Divide(num_queries, num_keys, sparse)) {
      for (int head = part.first_head; head < part.first_head + part.num_heads; ++head) {
        for (int64_t b = 0; b < part.num_blocks; ++b) {
          ++covered[head * blocks + part.first_block + b];
        }
      }
    }
    for (int64_t i = 0; i < kHeads * blocks; ++i) {
      ASSERT_EQ(covered[i], i % blocks >= (num_keys - num_queries) / kBlock ? 1 : 0) << i;
    }
  }
}

// On an H200 a pair takes 12.8 ns.
TEST(AttentionParts, OfAMillionTokensAreShortAndFillTheDevice) {
  const std::vector<Part> dense = Divide(1'000'000, 1'000'000, /*sparse=*/false);
  const std::vector<Part> sparse = Divide(1'000'000, 1'000'000, /*sparse=*/true);
  constexpr int64_t kMostPairs = 132 * 18'000;
  for (const Part& part : dense) EXPECT_LE(part.pairs, kMostPairs);
  for (const Part& part : sparse) EXPECT_LE(part.pairs, 2 * kMostPairs);
  EXPECT_GT(dense.size(), 3 * sparse.size() / 2);
  for (const auto& parts : {dense, sparse}) {
    for (const Part& part : parts) {
      const int64_t tiles = part.num_heads * part.num_blocks;
      if (part.first_block > 0) {
        EXPECT_LT((132 - tiles % 132) % 132, 7)
            << tiles << " tiles leave no more idle than they must";
      }
    }
  }
}

TEST(AttentionParts, OfShorterPromptsAreWholeGroupsOfHeads) {
  EXPECT_EQ(Divide(32'768, 32'768, /*sparse=*/false).size(), 1);
  EXPECT_EQ(Divide(65'536, 65'536, /*sparse=*/false).size(), 4);
  EXPECT_EQ(Divide(131'072, 131'072, /*sparse=*/true).size(), 4);
  EXPECT_EQ(Divide(131'072, 131'072, /*sparse=*/false).size(), 8);
  EXPECT_EQ(Divide(1, 1'000'000, /*sparse=*/false).size(), 1);
}

TEST(AttentionParts, FewQueriesBehindALongPrefixAreDividedToo) {
  EXPECT_GT(Divide(10'000, 1'000'000, /*sparse=*/false).size(), 5);
}

TEST(AttentionParts, OnACpuFillAllThreads) {
  for (const int threads : {2, 64}) {
    SCOPED_TRACE(threads);
    const auto device = *CreateDevice(DeviceChoice::kCpu, threads);
    const std::vector<Part> parts = Divide(131'072, 131'072, /*sparse=*/false, device->traits());
    EXPECT_GT(parts.size(), kHeads);
    for (const Part& part : parts) {
      if (part.first_block > 0) {
        EXPECT_GT(part.num_heads * part.num_blocks, threads - part.num_heads);
      }
      EXPECT_LE(part.pairs, threads * 2146) << "more than some 0.1 s";
    }
  }
}

AttentionOptions Sparse(AttentionPolicy policy, float coverage) {
  AttentionOptions options;
  options.policy = policy;
  options.gamma = policy == AttentionPolicy::kShare ? 0.8f : 0.3f;
  options.tau = 1.0f;
  options.coverage = coverage;
  options.score_threshold = 0.5f;
  options.last_rows_gamma = 0.3f;
  options.min_budget_tokens = 0;
  return options;
}

// Computes the queries from `first` on in two layers, of which the second shares what the first
// found, and returns the output of the second.
std::vector<float> Attend(OneLayer& layer, const AttentionOptions& options, int64_t first,
                          CountedPauses& pauses) {
  HeadClusters clusters;
  clusters.num_clusters = 2;
  clusters.cluster_of.assign(2, {0, 0, 1, 1, 0, 0, 1, 1});
  const auto workspace =
      *SharingWorkspace::Create(&layer.device(), &layer.config(), &clusters, layer.num_tokens(),
                                OneLayer::kBlockTokens, &pauses);
  const auto sharing = *PatternSharing::Create(workspace.get(), layer.num_tokens());
  sharing->StartPrompt(layer.num_tokens(), options);
  std::vector<float> out;
  for (int of = 0; of < 2; ++of) {
    LayerReport report;
    report.layer = of;
    AttentionParams params = layer.Params(&out);
    params.num_queries = layer.num_tokens() - first;
    params.q = params.out = &out[first * OneLayer::kNumHeads * OneLayer::kHeadDim];
    EXPECT_TRUE(sharing->Attend(of, params, &report).ok());
    EXPECT_TRUE(sharing->Report(&report).ok());
  }
  return out;
}

TEST(AttentionParts, GiveTheBitsOfTheWholeUnderEveryPolicy) {
  constexpr int64_t kTokens = 1000;
  constexpr int64_t kPair =
      int64_t{OneLayer::kBlockTokens} * OneLayer::kBlockTokens * OneLayer::kHeadDim;
  OneLayer layer(kTokens);
  for (const AttentionOptions& options :
       {Sparse(AttentionPolicy::kShare, /*coverage=*/1.0f),
        Sparse(AttentionPolicy::kShare, /*coverage=*/0.0f),  // no head shares, so all are scored
        Sparse(AttentionPolicy::kVerticalSlash, /*coverage=*/1.0f)}) {
    for (const int64_t first : {0, 448}) {
      SCOPED_TRACE(testing::Message()
                   << Name(options.policy) << ", " << options.coverage << ", from " << first);
      CountedPauses none(std::numeric_limits<int64_t>::max()), many(60 * kPair);
      EXPECT_EQ(Attend(layer, options, first, many), Attend(layer, options, first, none));
      EXPECT_EQ(none.count(LayerStage::kAttention), 0);
      EXPECT_GE(many.count(LayerStage::kAttention), 2 * 4);
    }
  }
}

}  // namespace
}  // namespace prefilld::model
