// Tests the host functions that choose launches and lay out scratch memory. Needs no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "kernels/antidiagonal_scores.h"
#include "kernels/attention.h"
#include "kernels/cuda/antidiagonal/plan.h"
#include "kernels/cuda/attention/plan.h"
#include "kernels/cuda/attention/sm90/forward.h"
#include "kernels/cuda/gated_linear.h"
#include "kernels/cuda/gated_linear/sm90/tile_order.h"
#include "kernels/cuda/kernel_path.h"
#include "kernels/cuda/launch_status.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pattern/plan.h"
#include "kernels/pattern.h"

namespace prefilld::kernels::cuda {
namespace {

const uint32_t kSomePattern[1] = {1};
float some_mass[1];

AttentionParams Params(const std::vector<HeadWork>& work) {
  AttentionParams params;
  params.num_queries = params.num_keys = 1000;
  params.num_heads = 200;
  params.num_kv_heads = 8;
  params.head_dim = 128;
  params.work = work.data();
  params.num_work = static_cast<int>(work.size());
  return params;
}

TEST(HeadGroups, DealEveryHeadOnceWithBlockMassApartAndDenseFirst) {
  std::vector<HeadWork> work(200);
  for (int i = 0; i < 200; ++i) {
    work[i].head = i;
    if (i % 5 == 0) work[i].block_mass = some_mass;
    if (i % 5 >= 3) work[i].pattern = kSomePattern;
  }
  const AttentionParams params = Params(work);
  HeadGroups groups(params);
  HeadGroup group;
  std::set<int> seen;
  bool block_mass_over = false;
  while (groups.Next(&group)) {
    ASSERT_LE(group.num_heads, kMaxHeadsPerLaunch);
    block_mass_over |= !group.block_mass;
    EXPECT_FALSE(block_mass_over && group.block_mass);
    for (int i = 0; i < group.num_heads; ++i) {
      EXPECT_TRUE(seen.insert(group.heads[i].head).second);
      EXPECT_EQ(group.heads[i].block_mass != nullptr, group.block_mass);
      EXPECT_EQ(group.heads[i].pattern == nullptr, i < group.num_dense);
    }
  }
  EXPECT_EQ(seen.size(), 200u);
}

TEST(HeadGroups, NoWorkIsNoGroup) {
  const AttentionParams params = Params({});
  HeadGroups groups(params);
  HeadGroup group;
  EXPECT_FALSE(groups.Next(&group));
}

TEST(AttentionPlan, RefusesShapesWithoutAKernel) {
  const std::vector<HeadWork> work(1);
  EXPECT_TRUE(IsSupported(Params(work)));
  AttentionParams params = Params(work);
  params.head_dim = 96;
  EXPECT_FALSE(IsSupported(params));
  params = Params(work);
  params.block_tokens = 32;
  EXPECT_FALSE(IsSupported(params));
  params = Params(work);
  params.num_kv_heads = 3;
  EXPECT_FALSE(IsSupported(params));
  params = Params(work);
  params.num_queries = 1001;
  EXPECT_FALSE(IsSupported(params));
  const std::vector<HeadWork> both = {{.pattern = kSomePattern, .block_mass = some_mass}};
  EXPECT_FALSE(IsSupported(Params(both)));
}

TEST(AttentionPlan, HopperKernelsRunOnHopperForBlocksOf128) {
  const GpuTraits hopper = {.num_sms = 132, .compute_major = 9};
  const GpuTraits ampere = {.num_sms = 108, .compute_major = 8};
  const GpuTraits blackwell = {.num_sms = 148, .compute_major = 10};
  AttentionParams params = Params({});
  params.kv_head_stride = 1000 * 128;
  const auto choose = [&](const GpuTraits& gpu, KernelPath path) {
    return ChoosePath(path, gpu, sm90::Supports(params));
  };
  EXPECT_EQ(choose(hopper, KernelPath::kFastest), KernelPath::kHopper);
  EXPECT_EQ(choose(hopper, KernelPath::kPortable), KernelPath::kPortable);
  EXPECT_EQ(choose(ampere, KernelPath::kFastest), KernelPath::kPortable);
  EXPECT_EQ(choose(blackwell, KernelPath::kFastest), KernelPath::kPortable);
  params.block_tokens = 64;
  EXPECT_EQ(choose(hopper, KernelPath::kFastest), KernelPath::kPortable);
}

TEST(AttentionPlan, InsistingOnHopperKernelsGetsNoOthers) {
  const GpuTraits hopper = {.num_sms = 132, .compute_major = 9};
  const GpuTraits ampere = {.num_sms = 108, .compute_major = 8};
  EXPECT_EQ(ChoosePath(KernelPath::kHopper, hopper, true), KernelPath::kHopper);
  EXPECT_EQ(ChoosePath(KernelPath::kHopper, hopper, false), std::nullopt);
  EXPECT_EQ(ChoosePath(KernelPath::kHopper, ampere, true), std::nullopt);
}

TEST(AttentionPlan, CountsQueryBlocksByAbsolutePosition) {
  AttentionParams params = Params({});
  params.num_keys = 300;
  params.num_queries = 300;
  EXPECT_EQ(NumQueryBlocks(params), 3);
  params.num_queries = 45;  // positions 255 .. 299: blocks 1 and 2
  EXPECT_EQ(NumQueryBlocks(params), 2);
  params.num_queries = 44;
  EXPECT_EQ(NumQueryBlocks(params), 1);
}

TEST(AttentionPlan, BlockMassTakesNoMoreCtasThanTiles) {
  const AttentionParams params = Params({});
  EXPECT_EQ(BlockMassCtas(params, 1, 132), 8);
  EXPECT_EQ(BlockMassCtas(params, 100, 132), 264);
  EXPECT_EQ(BlockMassFloatsPerCta(params), 1024);
}

TEST(EstimatePlan, ScratchFitsTheContract) {
  for (const int block_tokens : {64, 128}) {
    for (const int num_heads : {1, 28}) {
      for (int64_t num_keys = 1; num_keys < 3'000'000; num_keys += num_keys / 7 + 1) {
        const EstimatePlan plan = PlanEstimate(num_keys);
        EXPECT_EQ(plan.chunk_keys % 256, 0);
        EXPECT_GE(plan.num_chunks * plan.chunk_keys, num_keys);
        EXPECT_LT((plan.num_chunks - 1) * plan.chunk_keys, num_keys);
        EXPECT_LE(LayOutEstimateScratch(plan, num_heads, block_tokens).floats *
                      static_cast<int64_t>(sizeof(float)),
                  EstimateScratchBytes(num_heads, num_keys, block_tokens))
            << num_keys;
      }
    }
  }
}

TEST(EstimatePlan, HopperScratchFitsTheContract) {
  for (const int num_heads : {1, 28}) {
    for (int64_t num_keys = 1; num_keys < 3'000'000; num_keys += num_keys / 7 + 1) {
      for (const int64_t num_queries : {int64_t{1}, std::min<int64_t>(num_keys, 128)}) {
        const int groups = sm90::NumEstimateGroups(num_queries, num_keys);
        const int64_t keys = int64_t{groups} * sm90::kEstimateGroupBlocks * sm90::kEstimateBlock;
        EXPECT_GE(keys, num_keys);
        EXPECT_GE(keys, num_keys - num_queries + sm90::kEstimateBlock) << "lowest offset missed";
        EXPECT_LE(sm90::LayOutEstimateScratch(groups, num_heads).floats *
                      static_cast<int64_t>(sizeof(float)),
                  EstimateScratchBytes(num_heads, num_keys, 128))
            << num_keys;
      }
    }
  }
}

TEST(LinearShape, KnowsTheAlignmentOfAllOperands) {
  alignas(512) static char memory[1024];
  LinearParams params;
  params.x = memory;
  params.w = memory + 512;
  params.y = memory + 256;
  EXPECT_EQ(ShapeOf(params).alignment, 256u);
  params.y = memory + 16;
  EXPECT_EQ(ShapeOf(params).alignment, 16u);
  params.bias = memory + 2;
  EXPECT_EQ(ShapeOf(params).alignment, 2u);
  EXPECT_TRUE(ShapeOf(params).bias);
}

TEST(LaunchStatus, KeepsTheErrorOfTheLibraryThatFailed) {
  EXPECT_TRUE(LaunchStatus().ok());
  EXPECT_TRUE(LaunchStatus(cudaSuccess).ok());
  EXPECT_TRUE(LaunchStatus(CUBLAS_STATUS_SUCCESS).ok());
  const LaunchStatus launch = cudaErrorLaunchFailure;
  EXPECT_FALSE(launch.ok());
  EXPECT_EQ(launch.cuda(), cudaErrorLaunchFailure);
  EXPECT_EQ(launch.cublas(), CUBLAS_STATUS_SUCCESS);
  const LaunchStatus product = CUBLAS_STATUS_NOT_SUPPORTED;
  EXPECT_FALSE(product.ok());
  EXPECT_EQ(product.cuda(), cudaSuccess);
  EXPECT_EQ(product.cublas(), CUBLAS_STATUS_NOT_SUPPORTED);
}

TEST(LaunchStatus, TuningGoesOnWithoutACandidateButNotWithoutTheGpu) {
  EXPECT_FALSE(LaunchStatus().is_fault());
  EXPECT_FALSE(LaunchStatus(cudaErrorInvalidValue).is_fault());
  EXPECT_FALSE(LaunchStatus(CUBLAS_STATUS_NOT_SUPPORTED).is_fault());
  EXPECT_TRUE(LaunchStatus(cudaErrorIllegalAddress).is_fault());
  EXPECT_TRUE(LaunchStatus(CUBLAS_STATUS_EXECUTION_FAILED).is_fault());
}

TEST(GatedLinearLauncher, ReportsWhatSwiGluSaysAndNotTheProduct) {
  LinearLauncher linear;
  GatedLinearLauncher launcher(&linear);
  const GatedLinearParams params = {.num_tokens = 0, .in_features = 8, .intermediate = 12};
  EXPECT_EQ(launcher.Launch(params, nullptr, KernelPath::kPortable), cudaErrorInvalidValue);
}

TEST(GatedLinearTileOrder, VisitsEachTileOnceAndKeepsTheSquareOfAWave) {
  using sm90::gated_linear::PairNumber;
  constexpr int kClusters = 66;
  for (const auto& [num_pairs, num_columns] : {std::pair(1, 1), {1, 50}, {9, 33}, {32, 148}}) {
    std::set<std::pair<int, int>> seen;
    for (int first = 0; first < num_pairs * num_columns; first += kClusters) {
      std::set<int> pairs, columns;
      for (int i = first; i < std::min(first + kClusters, num_pairs * num_columns); ++i) {
        const auto [pair, column] = PairNumber({num_pairs, num_columns}, i);
        EXPECT_TRUE(pair >= 0 && pair < num_pairs && column >= 0 && column < num_columns) << i;
        EXPECT_TRUE(seen.insert({pair, column}).second) << i;
        pairs.insert(pair);
        columns.insert(column);
      }
      if (num_pairs % 8 == 0) {
        EXPECT_LE(pairs.size(), 16u) << "two groups where one ends within the wave";
        EXPECT_LE(columns.size(), 10u);
      }
    }
    EXPECT_EQ(seen.size(), static_cast<size_t>(num_pairs * num_columns));
  }
}

TEST(AntidiagonalScores, EveryItemHasOneWorkerAndWorkersHaveAlikeSums) {
  constexpr int kWorkers = 66;
  for (const int num_items : {1, 65, 66, 67, 1792}) {
    std::set<int> seen;
    std::vector<int> sums(kWorkers);
    for (int worker = 0; worker < kWorkers; ++worker) {
      for (int turn = 0; turn * kWorkers < num_items; ++turn) {
        const int item = ItemOfTurn(turn, worker, kWorkers);
        if (item >= num_items) continue;
        EXPECT_GE(item, 0);
        EXPECT_TRUE(seen.insert(item).second) << item;
        sums[static_cast<size_t>(worker)] += num_items - item;  // the first items are the longest
      }
    }
    EXPECT_EQ(seen.size(), static_cast<size_t>(num_items));
    if (num_items < 10 * kWorkers) continue;
    const auto [least, most] = std::minmax_element(sums.begin(), sums.end());
    EXPECT_LE(*most, *least * 103 / 100);
  }
}

TEST(AntidiagonalScores, ScratchHasRoomForWholeRunsOfFolds) {
  AntidiagonalScoresParams p;
  p.block_tokens = 128;
  for (const int stride : {8, 16}) {
    p.stride = stride;
    for (const int64_t keys : {1, 127, 129, 4096, 4097, 1 << 20}) {
      p.num_keys = p.num_queries = keys;
      const int64_t blocks = WeightBlocks(p);
      EXPECT_GE(blocks, AntidiagonalFolds(p).num_key_blocks) << keys;
      EXPECT_EQ(blocks * 128 / stride % kMaxFoldRun, 0) << keys;
    }
  }
}

TEST(VerticalSlashClusterSize, FillsTheMultiprocessorsOnceAndSplitsNoFewKeys) {
  constexpr int kSms = 132;
  EXPECT_EQ(VerticalSlashClusterSize(28, 131072, kSms), 2);
  EXPECT_EQ(VerticalSlashClusterSize(32, 131072, kSms), 2);
  EXPECT_EQ(VerticalSlashClusterSize(34, 131072, kSms), 1);
  EXPECT_EQ(VerticalSlashClusterSize(14, 131072, kSms), 4);
  EXPECT_EQ(VerticalSlashClusterSize(1, 131072, kSms), 8);
  EXPECT_EQ(VerticalSlashClusterSize(1, 16384, kSms), 2);
  EXPECT_EQ(VerticalSlashClusterSize(1, 16383, kSms), 1);
}

}  // namespace
}  // namespace prefilld::kernels::cuda
