#include "kernels/cuda/pattern.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/pattern/plan.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_pattern.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

// Adds `padding` NaNs behind each head of keys [num_kv_heads, num_keys, head_dim].
std::vector<float> Padded(const std::vector<float>& k, const EstimateCase& c, int64_t padding) {
  const int64_t length = c.num_keys * c.head_dim;
  std::vector<float> padded;
  for (int head = 0; head < c.num_kv_heads; ++head) {
    padded.insert(padded.end(), k.begin() + head * length, k.begin() + (head + 1) * length);
    padded.insert(padded.end(), static_cast<size_t>(padding * c.head_dim),
                  std::numeric_limits<float>::quiet_NaN());
  }
  return padded;
}

// Compares the estimate of num_queries queries, on both paths, with the reference. As in a prefill
// there is room behind each head's keys, which nobody may read.
void ExpectEstimateEqualsReference(const EstimateCase& c, int64_t num_queries) {
  const Qkv data = MakeQkv(num_queries, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 2);
  const auto scratch_bytes =
      static_cast<size_t>(EstimateScratchBytes(c.num_heads, c.num_keys, c.block_tokens));
  EstimateParams p;
  p.num_queries = num_queries;
  p.num_keys = c.num_keys;
  constexpr int64_t kPadding = 24;
  const std::vector<float> keys = Padded(data.k, c, kPadding);
  p.kv_head_stride = (c.num_keys + kPadding) * c.head_dim;
  p.num_heads = c.num_heads;
  p.num_kv_heads = c.num_kv_heads;
  p.head_dim = c.head_dim;
  p.block_tokens = c.block_tokens;
  p.scale = 0.125f;

  std::vector<float> block_mass(
      static_cast<size_t>(c.num_heads * CeilDiv(c.num_keys, c.block_tokens)));
  std::vector<float> vertical(static_cast<size_t>(c.num_heads * c.num_keys));
  std::vector<float> slash(vertical.size());
  p.q = data.q.data();
  p.k = keys.data();
  p.block_mass = block_mass.data();
  p.vertical = vertical.data();
  p.slash = slash.data();
  reference::Estimate(p);

  const DeviceArray<Bf16> q(ToBf16(data.q)), k(ToBf16(keys));
  p.q = q.data();
  p.k = k.data();
  for (const cuda::KernelPath path : {cuda::KernelPath::kFastest, cuda::KernelPath::kPortable}) {
    const std::string name = path == cuda::KernelPath::kFastest ? "fastest" : "portable";
    // An output that a kernel fails to write stays NaN.
    const std::vector<float> unset(vertical.size(), std::numeric_limits<float>::quiet_NaN());
    const DeviceArray<float> device_block_mass(std::vector<float>(block_mass.size(), unset[0])),
        device_vertical(unset), device_slash(unset);
    const DeviceArray<char> device_scratch(scratch_bytes);
    p.block_mass = device_block_mass.data();
    p.vertical = device_vertical.data();
    p.slash = device_slash.data();
    p.scratch = device_scratch.data();
    PREFILLD_ASSERT_CUDA(cuda::LaunchEstimate(p, nullptr, path));
    const auto expect_close = [&](const char* what, const std::vector<float>& actual,
                                  const std::vector<float>& expected) {
      const Closeness closeness = Compare(actual.data(), expected.data(), actual.size());
      EXPECT_EQ(closeness.wrong_non_finite, 0u) << what << ", " << name;
      // The products are exact, while sums and exponentials are in fp32.
      EXPECT_LT(closeness.relative, 1e-4) << what << ", " << name << ": " << closeness;
    };
    expect_close("block mass", device_block_mass.Read(), block_mass);
    expect_close("vertical", device_vertical.Read(), vertical);
    expect_close("slash", device_slash.Read(), slash);
  }
}

class CudaEstimate : public GpuTestWithParam<EstimateCase> {};

TEST_P(CudaEstimate, EqualsReference) {
  const EstimateCase& c = GetParam();
  ExpectEstimateEqualsReference(c, std::min<int64_t>(c.block_tokens, c.num_keys));
}

INSTANTIATE_TEST_SUITE_P(Common, CudaEstimate, ::testing::ValuesIn(EstimateCases()),
                         CaseName<::testing::TestParamInfo<EstimateCase>>);
// These take chunks of more than the smallest number of keys, and more items than a GPU has
// multiprocessors.
INSTANTIATE_TEST_SUITE_P(Large, CudaEstimate,
                         ::testing::Values(EstimateCase{"LongChunks", 33000, 2, 1, 128, 128},
                                           EstimateCase{"ManyItems", 9000, 28, 4, 64, 128},
                                           EstimateCase{"LongChunksSmallBlocks", 20001, 2, 1, 64,
                                                        64}),
                         CaseName<::testing::TestParamInfo<EstimateCase>>);

// These have more heads than one KV head has, groups of 16 blocks of the Hopper kernel with and
// without a remainder, and more groups than a GPU has multiprocessors.
INSTANTIATE_TEST_SUITE_P(Groups, CudaEstimate,
                         ::testing::Values(EstimateCase{"OneGroup", 2048, 4, 2, 128, 128},
                                           EstimateCase{"OneBlockMore", 2176, 4, 2, 128, 128},
                                           EstimateCase{"OneKeyMore", 2049, 4, 2, 128, 128},
                                           EstimateCase{"OneKeyLess", 4095, 2, 1, 64, 128}),
                         CaseName<::testing::TestParamInfo<EstimateCase>>);

class CudaPattern : public GpuTest {};

// The recall audit also asks for blocks before the last one, and the last block of a prompt may
// hold few queries.
TEST_F(CudaPattern, EstimateOfFewQueriesEqualsReference) {
  for (const int64_t num_keys : {200, 2048, 2100, 4200}) {
    for (const int64_t num_queries : {1, 63, 64, 100}) {
      SCOPED_TRACE(::testing::Message() << num_queries << " queries, " << num_keys << " keys");
      ExpectEstimateEqualsReference({"", num_keys, 4, 2, 128, 128}, num_queries);
      ExpectEstimateEqualsReference({"", num_keys, 2, 1, 64, 128}, num_queries);
    }
  }
}

// Makes masses of `num_heads` rows that sum to 1: a few large ones and many small ones. With `ties`
// they have few distinct values.
std::vector<float> MakeMasses(int num_heads, int64_t n, bool ties, uint32_t seed) {
  std::mt19937 random(seed);
  std::exponential_distribution<float> exponential;
  std::uniform_int_distribution<int> level(0, 3);
  std::vector<float> mass(static_cast<size_t>(num_heads * n));
  for (int h = 0; h < num_heads; ++h) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float x = exponential(random);
      float& m = mass[static_cast<size_t>(h * n + i)];
      m = ties ? static_cast<float>(level(random)) : x * x * x * x;
      sum += m;
    }
    for (int64_t i = 0; sum > 0.0f && i < n; ++i) mass[static_cast<size_t>(h * n + i)] /= sum;
  }
  return mass;
}

// Kernel and reference sum in different arithmetic (pattern/smallest_set.cuh), so their sets are
// equal unless the running sum comes within rounding of the target. Gamma 1 over many distinct
// values always does, so gamma 1 is tested with few distinct values only.
bool DecidedByRounding(bool ties, float gamma) { return gamma == 1.0f && !ties; }

// Compares the columns and diagonals of p, whose pointers are not set, with the reference.
void ExpectVerticalSlashEqualsReference(VerticalSlashParams p, const std::vector<float>& vertical,
                                        const std::vector<float>& slash) {
  const auto num_words =
      static_cast<size_t>(p.num_heads * PatternWords(CeilDiv(p.num_keys, p.block_tokens)));
  std::vector<uint32_t> columns(num_words), diagonals(num_words);
  p.vertical = vertical.data();
  p.slash = slash.data();
  p.columns = columns.data();
  p.diagonals = diagonals.data();
  reference::VerticalSlash(p);
  const DeviceArray<float> device_vertical(vertical), device_slash(slash);
  const DeviceArray<uint32_t> device_columns(num_words), device_diagonals(num_words);
  p.vertical = device_vertical.data();
  p.slash = device_slash.data();
  p.columns = device_columns.data();
  p.diagonals = device_diagonals.data();
  PREFILLD_ASSERT_CUDA(cuda::LaunchVerticalSlash(p, nullptr));
  EXPECT_EQ(device_columns.Read(), columns);
  EXPECT_EQ(device_diagonals.Read(), diagonals);
}

TEST_F(CudaPattern, VerticalSlashEqualsReferenceWithAndWithoutTies) {
  constexpr int kHeads = 3;
  for (const int64_t num_keys : {1, 64, 65, 700, 5000, 9000, 100000}) {
    for (const bool ties : {false, true}) {
      const std::vector<float> vertical = MakeMasses(kHeads, num_keys, ties, 1);
      const std::vector<float> slash = MakeMasses(kHeads, num_keys, ties, 2);
      for (const float gamma : {0.3f, 0.9f, 0.999f, 1.0f}) {
        if (DecidedByRounding(ties, gamma)) continue;
        for (const int64_t budget : {0, 100, 1000000}) {
          SCOPED_TRACE(::testing::Message() << num_keys << " keys, ties " << ties << ", gamma "
                                            << gamma << ", budget " << budget);
          VerticalSlashParams p;
          p.num_keys = num_keys;
          p.num_heads = kHeads;
          p.block_tokens = 64;
          p.gamma = gamma;
          p.min_budget_tokens = budget;
          ExpectVerticalSlashEqualsReference(p, vertical, slash);
        }
      }
    }
  }
}

// Does the same with masses made here, in blocks of the default size.
void ExpectVerticalSlashEqualsReference(int num_heads, int64_t num_keys, bool ties, float gamma) {
  VerticalSlashParams p;
  p.num_keys = num_keys;
  p.num_heads = num_heads;
  p.gamma = gamma;
  p.min_budget_tokens = 1000;
  ExpectVerticalSlashEqualsReference(p, MakeMasses(num_heads, num_keys, ties, 3),
                                     MakeMasses(num_heads, num_keys, ties, 4));
}

TEST_F(CudaPattern, VerticalSlashOfClustersOfEverySizeEqualsReference) {
  constexpr int64_t kNumKeys = 66049;  // no multiple of a warp or a block
  cuda::GpuTraits gpu;
  PREFILLD_ASSERT_CUDA(cuda::CurrentGpu(&gpu));
  std::set<int> sizes;
  // On 132 multiprocessors these get 1, 2, 4 and 8 CTAs per set.
  for (const int num_heads : {70, 30, 14, 3}) {
    sizes.insert(cuda::VerticalSlashClusterSize(num_heads, kNumKeys, gpu.num_sms));
    for (const bool ties : {false, true}) {
      SCOPED_TRACE(::testing::Message() << num_heads << " heads, ties " << ties);
      ExpectVerticalSlashEqualsReference(num_heads, kNumKeys, ties, 0.7f);
    }
  }
  if (gpu.num_sms >= 132) {
    EXPECT_EQ(sizes, (std::set<int>{1, 2, 4, 8}));
  }
}

// This is small enough for racecheck. Eight CTAs search each set.
TEST_F(CudaPattern, VerticalSlashOfOneHeadEqualsReference) {
  ExpectVerticalSlashEqualsReference(1, 131073, /*ties=*/false, 0.7f);
}

// A CTA's histogram has room for 2^18 masses. Here the eight CTAs of one head have more, and masses
// of few values fill up some bins.
TEST_F(CudaPattern, VerticalSlashOfMoreKeysThanHistogramsTakeEqualsReference) {
  for (const int64_t num_keys : {int64_t{8} << 18, (int64_t{8} << 18) + 1, int64_t{2300001}}) {
    for (const bool ties : {false, true}) {
      SCOPED_TRACE(::testing::Message() << num_keys << " keys, ties " << ties);
      ExpectVerticalSlashEqualsReference(1, num_keys, ties, 0.9f);
    }
  }
}

TEST_F(CudaPattern, AmongEqualMassesTheLowestIndexWins) {
  const DeviceArray<float> mass(std::vector<float>(4096, 1.0f / 4096));
  const DeviceArray<uint32_t> columns(1), diagonals(1);
  VerticalSlashParams p;
  p.vertical = mass.data();
  p.slash = mass.data();
  p.num_keys = 4096;
  p.num_heads = 1;
  p.block_tokens = 128;
  p.gamma = 0.5f;
  p.columns = columns.data();
  p.diagonals = diagonals.data();
  PREFILLD_ASSERT_CUDA(cuda::LaunchVerticalSlash(p, nullptr));
  EXPECT_EQ(columns.Read()[0], 0x0000ffffu);
  EXPECT_EQ(diagonals.Read()[0], 0x0001ffffu);  // the last offset chosen, 2047, crosses block 16
}

TEST_F(CudaPattern, ExpandVerticalSlashEqualsReferenceHeadByHead) {
  constexpr int kHeads = 3;
  for (const int64_t key_blocks : {1, 2, 31, 32, 33, 64, 100}) {
    const int64_t words = PatternWords(key_blocks);
    // Rows of a random pattern serve as random bits.
    std::vector<uint32_t> columns, diagonals;
    for (uint32_t head = 0; head < kHeads; ++head) {
      for (std::vector<uint32_t>* bits : {&columns, &diagonals}) {
        const uint32_t seed = 2 * head + (bits == &diagonals ? 1 : 0);
        const std::vector<uint32_t> row = MakePattern(1, key_blocks, 0.1, seed);
        bits->insert(bits->end(), row.begin(), row.end());
      }
    }
    const DeviceArray<uint32_t> device_columns(columns), device_diagonals(diagonals);
    for (const int64_t query_blocks : {int64_t{1}, key_blocks / 2 + 1, key_blocks}) {
      std::vector<uint32_t> expected(static_cast<size_t>(kHeads * query_blocks * words));
      std::vector<int64_t> expected_blocks(kHeads);
      const DeviceArray<uint32_t> actual(expected.size());
      const DeviceArray<int64_t> actual_blocks(kHeads);
      ExpandVerticalSlashParams p;
      p.num_query_blocks = query_blocks;
      p.num_key_blocks = key_blocks;
      // The reference takes one head at a time.
      for (int head = 0; head < kHeads; ++head) {
        p.columns = columns.data() + head * words;
        p.diagonals = diagonals.data() + head * words;
        p.pattern = expected.data() + head * query_blocks * words;
        reference::ExpandVerticalSlash(p);
        for (int64_t i = 0; i < query_blocks * words; ++i) {
          expected_blocks[static_cast<size_t>(head)] += std::popcount(p.pattern[i]);
        }
      }
      p.num_heads = kHeads;
      p.columns = device_columns.data();
      p.diagonals = device_diagonals.data();
      p.pattern = actual.data();
      p.blocks = actual_blocks.data();
      PREFILLD_ASSERT_CUDA(cuda::LaunchExpandVerticalSlash(p, nullptr));
      EXPECT_EQ(actual.Read(), expected) << query_blocks << " of " << key_blocks;
      EXPECT_EQ(actual_blocks.Read(), expected_blocks) << query_blocks << " of " << key_blocks;
    }
  }
}

// Makes block mass as attention writes it: rows sum to 1, and nothing is above the diagonal.
std::vector<float> MakeBlockMass(int64_t query_blocks, int64_t key_blocks, bool ties) {
  std::vector<float> mass(static_cast<size_t>(query_blocks * key_blocks));
  for (int64_t row = 0; row < query_blocks; ++row) {
    const int64_t n = key_blocks - query_blocks + row + 1;
    const std::vector<float> values = MakeMasses(1, n, ties, static_cast<uint32_t>(row));
    std::copy(values.begin(), values.end(), mass.begin() + row * key_blocks);
  }
  return mass;
}

TEST_F(CudaPattern, SelectRowsEqualsReferenceWithAndWithoutTies) {
  for (const int64_t key_blocks : {1, 2, 32, 33, 70, 300}) {
    for (const int64_t query_blocks : {int64_t{1}, key_blocks}) {
      for (const bool ties : {false, true}) {
        const std::vector<float> mass = MakeBlockMass(query_blocks, key_blocks, ties);
        const DeviceArray<float> device_mass(mass);
        for (const float gamma : {0.1f, 0.9f, 1.0f}) {
          if (DecidedByRounding(ties, gamma)) continue;
          std::vector<uint32_t> expected(
              static_cast<size_t>(query_blocks * PatternWords(key_blocks)));
          reference::SelectRows({mass.data(), query_blocks, key_blocks, gamma, expected.data()});
          const DeviceArray<uint32_t> actual(expected.size());
          PREFILLD_ASSERT_CUDA(cuda::LaunchSelectRows(
              {device_mass.data(), query_blocks, key_blocks, gamma, actual.data()}, nullptr));
          EXPECT_EQ(actual.Read(), expected)
              << query_blocks << " of " << key_blocks << ", ties " << ties << ", gamma " << gamma;
        }
      }
    }
  }
}

TEST_F(CudaPattern, SelectRowsTakesHeadsOneAfterTheOther) {
  constexpr int64_t kHeads = 3, kQueryBlocks = 5, kKeyBlocks = 70;
  const int64_t words = kQueryBlocks * PatternWords(kKeyBlocks);
  std::vector<float> mass;
  for (uint32_t head = 0; head < kHeads; ++head) {
    const std::vector<float> rows = MakeMasses(kQueryBlocks, kKeyBlocks, false, head);
    mass.insert(mass.end(), rows.begin(), rows.end());
  }
  std::vector<uint32_t> expected(static_cast<size_t>(kHeads * words));
  for (int head = 0; head < kHeads; ++head) {
    reference::SelectRows({mass.data() + head * kQueryBlocks * kKeyBlocks, kQueryBlocks, kKeyBlocks,
                           0.9f, expected.data() + head * words});
  }
  const DeviceArray<float> device_mass(mass);
  const DeviceArray<uint32_t> actual(expected.size());
  PREFILLD_ASSERT_CUDA(cuda::LaunchSelectRows(
      {device_mass.data(), kQueryBlocks, kKeyBlocks, 0.9f, actual.data(), kHeads}, nullptr));
  EXPECT_EQ(actual.Read(), expected);
}

TEST_F(CudaPattern, SelectRowsJoinsWhatThePatternHasAndCounts) {
  constexpr int64_t kHeads = 2, kBlocks = 300;
  const int64_t words = kBlocks * PatternWords(kBlocks);
  std::vector<float> mass;
  std::vector<uint32_t> old;
  for (uint32_t head = 0; head < kHeads; ++head) {
    const std::vector<float> rows = MakeMasses(kBlocks, kBlocks, false, head);
    mass.insert(mass.end(), rows.begin(), rows.end());
    const std::vector<uint32_t> bits = MakePattern(kBlocks, kBlocks, 0.1, head);
    old.insert(old.end(), bits.begin(), bits.end());
  }
  std::vector<uint32_t> expected(old.size());
  std::vector<int64_t> expected_blocks(kHeads);
  for (int64_t head = 0; head < kHeads; ++head) {
    reference::SelectRows({mass.data() + head * kBlocks * kBlocks, kBlocks, kBlocks, 0.5f,
                           expected.data() + head * words});
    for (int64_t i = head * words; i < (head + 1) * words; ++i) {
      expected[static_cast<size_t>(i)] |= old[static_cast<size_t>(i)];
      expected_blocks[static_cast<size_t>(head)] += std::popcount(expected[static_cast<size_t>(i)]);
    }
  }
  const DeviceArray<float> device_mass(mass);
  const DeviceArray<uint32_t> actual(old);
  const DeviceArray<int64_t> blocks(kHeads);
  PREFILLD_ASSERT_CUDA(cuda::LaunchSelectRows({.block_mass = device_mass.data(),
                                               .num_query_blocks = kBlocks,
                                               .num_key_blocks = kBlocks,
                                               .gamma = 0.5f,
                                               .pattern = actual.data(),
                                               .num_heads = kHeads,
                                               .join = true,
                                               .blocks = blocks.data()},
                                              nullptr));
  EXPECT_EQ(actual.Read(), expected);
  EXPECT_EQ(blocks.Read(), expected_blocks);
}

TEST_F(CudaPattern, MeasurePatternEqualsReference) {
  for (const int64_t key_blocks : {1, 33, 70, 1100}) {
    for (const int64_t query_blocks : {int64_t{1}, key_blocks}) {
      const std::vector<float> mass = MakeBlockMass(query_blocks, key_blocks, false);
      const std::vector<uint32_t> pattern = MakePattern(query_blocks, key_blocks, 0.2, 3);
      const std::vector<uint32_t> last_row = MakePattern(1, key_blocks, 0.2, 4);
      const DeviceArray<float> device_mass(mass);
      const DeviceArray<uint32_t> device_pattern(pattern), device_last_row(last_row);
      for (const bool with_last_row : {false, true}) {
        double expected_mass = -1.0;
        int64_t expected_blocks = -1;
        reference::MeasurePattern({mass.data(), pattern.data(),
                                   with_last_row ? last_row.data() : nullptr, query_blocks,
                                   key_blocks, &expected_mass, &expected_blocks});
        const DeviceArray<double> actual_mass(1);
        const DeviceArray<int64_t> actual_blocks(1);
        MeasurePatternParams p{device_mass.data(),
                               device_pattern.data(),
                               with_last_row ? device_last_row.data() : nullptr,
                               query_blocks,
                               key_blocks,
                               actual_mass.data(),
                               actual_blocks.data()};
        PREFILLD_ASSERT_CUDA(cuda::LaunchMeasurePattern(p, nullptr));
        EXPECT_NEAR(actual_mass.Read()[0], expected_mass, 1e-10);
        EXPECT_EQ(actual_blocks.Read()[0], expected_blocks);
        const DeviceArray<int64_t> count_only(1);
        p.block_mass = nullptr;
        p.mass = nullptr;
        p.blocks = count_only.data();
        PREFILLD_ASSERT_CUDA(cuda::LaunchMeasurePattern(p, nullptr));
        EXPECT_EQ(count_only.Read()[0], expected_blocks);
      }
    }
  }
}

}  // namespace
}  // namespace prefilld::kernels::testing
