#include "kernels/cuda/antidiagonal_scores.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/ops.h"
#include "kernels/cuda/pattern.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_pattern.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

using cuda::KernelPath;

constexpr KernelPath kPaths[] = {KernelPath::kFastest, KernelPath::kPortable};

const char* NameOf(KernelPath path) {
  return path == KernelPath::kPortable ? "portable" : "fastest";
}

// Adds `padding` NaNs behind each head of keys [num_kv_heads, num_keys, head_dim].
std::vector<float> Padded(const std::vector<float>& k, const AntidiagonalCase& c, int64_t padding) {
  const int64_t length = c.num_keys * c.head_dim;
  std::vector<float> padded;
  for (int head = 0; head < c.num_kv_heads; ++head) {
    padded.insert(padded.end(), k.begin() + head * length, k.begin() + (head + 1) * length);
    padded.insert(padded.end(), static_cast<size_t>(padding * c.head_dim),
                  std::numeric_limits<float>::quiet_NaN());
  }
  return padded;
}

// A case's inputs on the host and on the device. As in a prefill there is room behind each head's
// keys, which nobody may read.
struct ScoresData {
  static constexpr int64_t kPadding = 24;

  explicit ScoresData(const AntidiagonalCase& c)
      : qkv(MakeQkv(c.num_queries, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 5)),
        keys(Padded(qkv.k, c, kPadding)),
        heads(static_cast<size_t>(c.num_heads)),
        device_q(ToBf16(qkv.q)),
        device_k(ToBf16(keys)) {
    std::iota(heads.begin(), heads.end(), 0);
    params.num_queries = c.num_queries;
    params.num_keys = c.num_keys;
    params.kv_head_stride = (c.num_keys + kPadding) * c.head_dim;
    params.num_heads = c.num_heads;
    params.num_kv_heads = c.num_kv_heads;
    params.head_dim = c.head_dim;
    params.block_tokens = c.block_tokens;
    params.stride = c.stride;
    params.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    params.heads = heads.data();
    params.num_scored = c.num_heads;
  }

  size_t MassSize() const {
    const AntidiagonalFolds folds(params);
    return static_cast<size_t>(params.num_scored * folds.num_query_blocks * folds.num_key_blocks);
  }

  std::vector<float> OnHost(void (*op)(const AntidiagonalScoresParams&)) {
    std::vector<float> mass(MassSize());
    params.q = qkv.q.data();
    params.k = keys.data();
    params.block_mass = mass.data();
    op(params);
    return mass;
  }

  // Entries of `mass` that are not written stay NaN.
  void OnDevice(KernelPath path, const DeviceArray<float>& mass) {
    params.q = device_q.data();
    params.k = device_k.data();
    params.block_mass = mass.data();
    const DeviceArray<char> scratch(static_cast<size_t>(cuda::AntidiagonalScratchBytes(params)));
    PREFILLD_ASSERT_CUDA(cuda::LaunchAntidiagonalScores(params, scratch.data(), nullptr, path));
    PREFILLD_ASSERT_CUDA(cudaDeviceSynchronize());
  }

  Qkv qkv;
  std::vector<float> keys;
  std::vector<int> heads;
  DeviceArray<Bf16> device_q, device_k;
  AntidiagonalScoresParams params;
};

// Sets the entries above the diagonal to zero, which the op does not write.
void ClearAboveDiagonal(const AntidiagonalScoresParams& p, std::vector<float>& mass) {
  const AntidiagonalFolds folds(p);
  for (int64_t row = 0; row < p.num_scored * folds.num_query_blocks; ++row) {
    const int64_t diagonal = folds.first_query_block + row % folds.num_query_blocks;
    std::fill(mass.begin() + row * folds.num_key_blocks + diagonal + 1,
              mass.begin() + (row + 1) * folds.num_key_blocks, 0.0f);
  }
}

void ExpectEqualsReference(const AntidiagonalCase& c,
                           void (*reference)(const AntidiagonalScoresParams&)) {
  ScoresData data(c);
  const std::vector<float> expected = data.OnHost(reference);
  for (const KernelPath path : kPaths) {
    const DeviceArray<float> mass(expected.size());
    data.OnDevice(path, mass);
    std::vector<float> actual = mass.Read();
    ClearAboveDiagonal(data.params, actual);
    const Closeness closeness = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(closeness.wrong_non_finite, 0u) << NameOf(path);
    // The products are exact, while sums and exponentials are in fp32.
    EXPECT_LT(closeness.relative, 1e-4) << NameOf(path) << ": " << closeness;
  }
}

class CudaAntidiagonalScores : public GpuTestWithParam<AntidiagonalCase> {};

TEST_P(CudaAntidiagonalScores, EqualsReference) {
  ExpectEqualsReference(GetParam(), reference::AntidiagonalScores);
}

INSTANTIATE_TEST_SUITE_P(Common, CudaAntidiagonalScores, ::testing::ValuesIn(AntidiagonalCases()),
                         CaseName<::testing::TestParamInfo<AntidiagonalCase>>);

class CudaAntidiagonalScoresLarge : public GpuTestWithParam<AntidiagonalCase> {};

// The plain reference would take minutes here, so the op on the CPU stands in for it, which is
// compared with the reference by its own test.
TEST_P(CudaAntidiagonalScoresLarge, EqualsTheCpu) {
  ExpectEqualsReference(GetParam(), cpu::AntidiagonalScores);
}

// Each worker takes several items here; the last one has more heads than a launch holds.
INSTANTIATE_TEST_SUITE_P(
    Large, CudaAntidiagonalScoresLarge,
    ::testing::Values(AntidiagonalCase{"ManyItems", 9000, 9000, 28, 4, 128, 128, 8},
                      AntidiagonalCase{"LongFolds", 17001, 17001, 4, 1, 128, 128, 16},
                      AntidiagonalCase{"SmallBlocks", 8200, 8200, 16, 2, 64, 64, 8},
                      AntidiagonalCase{"LongSuffix", 6000, 20003, 4, 2, 64, 128, 8},
                      AntidiagonalCase{"ManyHeads", 2500, 2500, 70, 10, 64, 128, 8}),
    CaseName<::testing::TestParamInfo<AntidiagonalCase>>);

class CudaAntidiagonal : public GpuTest {};

TEST_F(CudaAntidiagonal, ScoresTheHeadsThatAreAskedFor) {
  ScoresData data({"", 1000, 1000, 6, 2, 64, 128, 8});
  data.heads = {4, 1};
  data.params.heads = data.heads.data();
  data.params.num_scored = 2;
  const std::vector<float> expected = data.OnHost(reference::AntidiagonalScores);
  for (const KernelPath path : kPaths) {
    const DeviceArray<float> mass(expected.size());
    data.OnDevice(path, mass);
    std::vector<float> actual = mass.Read();
    ClearAboveDiagonal(data.params, actual);
    EXPECT_LT(Compare(actual.data(), expected.data(), actual.size()).relative, 1e-4)
        << NameOf(path);
  }
}

TEST_F(CudaAntidiagonal, IsTheSameEveryTime) {
  ScoresData data({"", 5000, 5000, 8, 2, 128, 128, 8});
  for (const KernelPath path : kPaths) {
    const DeviceArray<float> first(data.MassSize()), second(data.MassSize());
    data.OnDevice(path, first);
    data.OnDevice(path, second);
    std::vector<float> a = first.Read(), b = second.Read();
    ClearAboveDiagonal(data.params, a);
    ClearAboveDiagonal(data.params, b);
    EXPECT_EQ(a, b) << NameOf(path);
  }
}

// Both devices choose the same blocks on the same inputs, but for those whose mass is so near the
// last chosen one's that rounding decides.
TEST_F(CudaAntidiagonal, ChoosesTheBlocksThatTheCpuChooses) {
  ScoresData data({"", 6000, 6000, 8, 2, 128, 128, 8});
  const AntidiagonalFolds folds(data.params);
  const int64_t n = folds.num_key_blocks;
  const auto words = static_cast<size_t>(data.params.num_scored * n * PatternWords(n));
  const std::vector<float> host_mass = data.OnHost(cpu::AntidiagonalScores);
  std::vector<uint32_t> expected(words);
  cpu::SelectRows({host_mass.data(), n, n, 0.95f, expected.data(), data.params.num_scored});
  for (const KernelPath path : kPaths) {
    const DeviceArray<float> mass(host_mass.size());
    data.OnDevice(path, mass);
    const DeviceArray<uint32_t> pattern(words);
    PREFILLD_ASSERT_CUDA(cuda::LaunchSelectRows(
        {mass.data(), n, n, 0.95f, pattern.data(), data.params.num_scored}, nullptr));
    const std::vector<uint32_t> actual = pattern.Read();
    int64_t chosen = 0, different = 0;
    for (size_t i = 0; i < words; ++i) {
      chosen += std::popcount(expected[i]);
      different += std::popcount(actual[i] ^ expected[i]);
    }
    EXPECT_LE(different, chosen / 500) << NameOf(path) << ": of " << chosen;
  }
}

TEST_F(CudaAntidiagonal, RefusesWhatNoKernelComputes) {
  ScoresData data({"", 200, 200, 2, 1, 64, 128, 8});
  const DeviceArray<float> mass(data.MassSize());
  AntidiagonalScoresParams p = data.params;
  p.q = data.device_q.data();
  p.k = data.device_k.data();
  p.block_mass = mass.data();
  const DeviceArray<char> scratch(static_cast<size_t>(cuda::AntidiagonalScratchBytes(p)));
  const auto refused = [&](const AntidiagonalScoresParams& wrong) {
    return cuda::LaunchAntidiagonalScores(wrong, scratch.data(), nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_FALSE(refused(p));
  EXPECT_EQ(cuda::LaunchAntidiagonalScores(p, nullptr, nullptr), cudaErrorInvalidValue);
  AntidiagonalScoresParams wrong = p;
  wrong.stride = 4;
  EXPECT_TRUE(refused(wrong));
  wrong = p;
  wrong.head_dim = 96;
  EXPECT_TRUE(refused(wrong));
  wrong = p;
  wrong.num_queries = wrong.num_keys + 1;
  EXPECT_TRUE(refused(wrong));
  const int no_head = 2;
  wrong = p;
  wrong.heads = &no_head;
  wrong.num_scored = 1;
  EXPECT_TRUE(refused(wrong));
}

}  // namespace
}  // namespace prefilld::kernels::testing
