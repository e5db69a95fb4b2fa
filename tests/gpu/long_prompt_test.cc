// Tests tensors of more than 2^31 elements, as a prompt of a million tokens has them. The few rows
// that are checked lie past that limit.
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/cpu/ops.h"
#include "kernels/cuda/antidiagonal_scores.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/layer_ops.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

using cuda::KernelPath;

constexpr int64_t kTokens = int64_t{1} << 20;
constexpr int64_t kLimit = int64_t{1} << 31;
constexpr int kHeadDim = 128;
constexpr int kBlock = 128;
constexpr double kRelativeTolerance = 5e-3;

// Makes uniform values in (-scale, scale), fast.
std::vector<Bf16> UniformValues(size_t count, float scale, uint32_t seed) {
  std::vector<Bf16> values(count);
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (Bf16& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const float uniform = static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-31f;
    value = static_cast<Bf16>(std::bit_cast<uint32_t>(uniform * scale) >> 16);
  }
  return values;
}

float ToFloat(Bf16 bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Computes one row of attention in double precision. `sees(key block)` tells which blocks count.
template <typename Sees>
std::vector<float> ReferenceRow(const Bf16* q, const std::vector<Bf16>& k,
                                const std::vector<Bf16>& v, int64_t position, float scale,
                                Sees sees) {
  std::vector<double> out(kHeadDim);
  double sum = 0.0;
  for (int64_t key = 0; key <= position; ++key) {
    if (!sees(key / kBlock)) continue;
    double logit = 0.0;
    for (int i = 0; i < kHeadDim; ++i) {
      logit +=
          static_cast<double>(ToFloat(q[i])) * ToFloat(k[static_cast<size_t>(key * kHeadDim + i)]);
    }
    const double p = std::exp(logit * scale);
    sum += p;
    for (int i = 0; i < kHeadDim; ++i) {
      out[static_cast<size_t>(i)] += p * ToFloat(v[static_cast<size_t>(key * kHeadDim + i)]);
    }
  }
  std::vector<float> row(kHeadDim);
  for (size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(out[i] / sum);
  return row;
}

void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected) {
  const Closeness c = Compare(actual.data(), expected.data(), actual.size());
  EXPECT_EQ(c.wrong_non_finite, 0u);
  EXPECT_LT(c.relative, kRelativeTolerance) << c;
}

void Launch(const AttentionParams& params, KernelPath path) {
  const DeviceArray<char> scratch(static_cast<size_t>(cuda::AttentionScratchBytes(params, path)));
  PREFILLD_ASSERT_CUDA(cuda::LaunchAttention(params, scratch.data(), nullptr, path));
  PREFILLD_ASSERT_CUDA(cudaDeviceSynchronize());
}

class CudaLongPrompt : public GpuTestWithParam<KernelPath> {};
INSTANTIATE_TEST_SUITE_P(FastestAndPortable, CudaLongPrompt,
                         ::testing::Values(KernelPath::kFastest, KernelPath::kPortable));

// Only the queries of the last block are not zero, and only they are checked.
TEST_P(CudaLongPrompt, AntidiagonalScores) {
  constexpr int kHeads = 17, kHead = 16;
  static_assert(kTokens * kHeads * kHeadDim > kLimit);
  const std::vector<Bf16> k = UniformValues(static_cast<size_t>(kTokens * kHeadDim), 2.0f, 4);
  const std::vector<Bf16> q =
      UniformValues(static_cast<size_t>(int64_t{kBlock} * kHeads * kHeadDim), 2.0f, 5);
  const DeviceArray<Bf16> device_q(static_cast<size_t>(kTokens * kHeads * kHeadDim)), device_k(k);
  PREFILLD_ASSERT_CUDA(cudaMemset(device_q.data(), 0, device_q.size() * sizeof(Bf16)));
  PREFILLD_ASSERT_CUDA(cudaMemcpy(device_q.data() + device_q.size() - q.size(), q.data(),
                                  q.size() * sizeof(Bf16), cudaMemcpyHostToDevice));
  constexpr int64_t kBlocks = kTokens / kBlock;
  const DeviceArray<float> mass(static_cast<size_t>(kBlocks * kBlocks));
  const int head = kHead;
  AntidiagonalScoresParams p = {.q = device_q.data(),
                                .k = device_k.data(),
                                .num_queries = kTokens,
                                .num_keys = kTokens,
                                .kv_head_stride = kTokens * kHeadDim,
                                .num_heads = kHeads,
                                .num_kv_heads = 1,
                                .head_dim = kHeadDim,
                                .block_tokens = kBlock,
                                .stride = 16,
                                .scale = 0.05f,
                                .heads = &head,
                                .num_scored = 1,
                                .block_mass = mass.data()};
  const DeviceArray<char> scratch(static_cast<size_t>(cuda::AntidiagonalScratchBytes(p)));
  PREFILLD_ASSERT_CUDA(cuda::LaunchAntidiagonalScores(p, scratch.data(), nullptr, GetParam()));
  PREFILLD_ASSERT_CUDA(cudaDeviceSynchronize());

  const std::vector<float> host_q = FromBf16(q), host_k = FromBf16(k);
  std::vector<float> expected(kBlocks);
  p.q = host_q.data();
  p.k = host_k.data();
  p.num_queries = kBlock;
  p.block_mass = expected.data();
  cpu::AntidiagonalScores(p);
  ExpectClose(mass.Read(static_cast<size_t>(kBlocks * (kBlocks - 1)), kBlocks), expected);
}

class CudaLongPromptOp : public GpuTest {};

TEST_P(CudaLongPrompt, KeysPastTheLimit) {
  const KernelPath path = GetParam();
  // The distance between the two KV heads alone passes the limit. The second head is used.
  const int64_t stride = kLimit + 64;
  const std::vector<Bf16> k = UniformValues(kTokens * kHeadDim, 1.0f, 1);
  const std::vector<Bf16> v = UniformValues(kTokens * kHeadDim, 1.0f, 2);
  constexpr int64_t kQueries = 130;  // three query blocks, the first and the last partial
  const std::vector<Bf16> q = UniformValues(kQueries * 2 * kHeadDim, 8.0f, 3);
  DeviceArray<Bf16> device_k(static_cast<size_t>(stride + kTokens * kHeadDim));
  DeviceArray<Bf16> device_v(device_k.size());
  device_k.Write(static_cast<size_t>(stride), k.data(), k.size());
  device_v.Write(static_cast<size_t>(stride), v.data(), v.size());
  const int64_t num_keys = kTokens - 60;
  const DeviceArray<Bf16> device_q(q), out(q.size());
  const int64_t key_blocks = CeilDiv(num_keys, kBlock);
  const int64_t query_blocks = key_blocks - (num_keys - kQueries) / kBlock;
  const DeviceArray<float> mass(static_cast<size_t>(query_blocks * key_blocks));
  const HeadWork work[] = {{.head = 1, .block_mass = mass.data()}};
  AttentionParams p;
  p.q = device_q.data();
  p.k = device_k.data();
  p.v = device_v.data();
  p.out = out.data();
  p.num_queries = kQueries;
  p.num_keys = num_keys;
  p.kv_head_stride = stride;
  p.num_heads = p.num_kv_heads = 2;
  p.head_dim = kHeadDim;
  p.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  p.work = work;
  p.num_work = 1;
  Launch(p, path);
  for (const int64_t row : {int64_t{0}, kQueries - 1}) {
    const int64_t element = (row * 2 + 1) * kHeadDim;
    ExpectClose(FromBf16(out.Read(static_cast<size_t>(element), kHeadDim)),
                ReferenceRow(&q[static_cast<size_t>(element)], k, v, num_keys - kQueries + row,
                             p.scale, [](int64_t) { return true; }));
  }
  const std::vector<float> masses = mass.Read();
  for (int64_t row = 0; row < query_blocks; ++row) {
    double sum = 0.0;
    for (int64_t c = 0; c < key_blocks; ++c)
      sum += masses[static_cast<size_t>(row * key_blocks + c)];
    EXPECT_NEAR(sum, 1.0, 1e-3);
  }
}

TEST_P(CudaLongPrompt, QueriesPastTheLimit) {
  const KernelPath path = GetParam();
  constexpr int kHeads = 17;
  constexpr int kHead = kHeads - 1;
  static_assert(kTokens * kHeads * kHeadDim > kLimit);
  const std::vector<Bf16> k = UniformValues(kTokens * kHeadDim, 1.0f, 4);
  const std::vector<Bf16> v = UniformValues(kTokens * kHeadDim, 1.0f, 5);
  const std::vector<Bf16> q = UniformValues(kTokens * kHeadDim, 8.0f, 6);
  const DeviceArray<Bf16> device_k(k), device_v(v);
  const DeviceArray<Bf16> device_q(static_cast<size_t>(kTokens * kHeads * kHeadDim));
  PREFILLD_ASSERT_CUDA(cudaMemcpy2D(
      device_q.data() + kHead * kHeadDim, kHeads * kHeadDim * sizeof(Bf16), q.data(),
      kHeadDim * sizeof(Bf16), kHeadDim * sizeof(Bf16), kTokens, cudaMemcpyHostToDevice));
  constexpr int64_t kBlocks = kTokens / kBlock;
  constexpr int64_t kWords = PatternWords(kBlocks);
  std::vector<uint32_t> pattern(static_cast<size_t>(kBlocks * kWords));
  const auto sees = [](int64_t row, int64_t block) {
    return block == 0 || block == row || block == row / 2;
  };
  for (int64_t row = 0; row < kBlocks; ++row) {
    for (const int64_t block : {int64_t{0}, row / 2, row}) {
      pattern[static_cast<size_t>(row * kWords + block / 32)] |= 1u << (block % 32);
    }
  }
  const DeviceArray<uint32_t> device_pattern(pattern);
  const HeadWork work[] = {{.head = kHead, .pattern = device_pattern.data()}};
  AttentionParams p;
  p.q = device_q.data();
  p.k = device_k.data();
  p.v = device_v.data();
  p.out = device_q.data();
  p.num_queries = p.num_keys = kTokens;
  p.kv_head_stride = kTokens * kHeadDim;
  p.num_heads = kHeads;
  p.num_kv_heads = 1;
  p.head_dim = kHeadDim;
  p.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  p.work = work;
  p.num_work = 1;
  Launch(p, path);
  for (const int64_t row : {int64_t{0}, int64_t{777'777}, kTokens - 1}) {
    const int64_t element = (row * kHeads + kHead) * kHeadDim;
    ExpectClose(FromBf16(device_q.Read(static_cast<size_t>(element), kHeadDim)),
                ReferenceRow(&q[static_cast<size_t>(row * kHeadDim)], k, v, row, p.scale,
                             [&](int64_t block) { return sees(row / kBlock, block); }));
  }
}

TEST_F(CudaLongPromptOp, LayerOpsPastTheLimit) {
  constexpr int64_t kWidth = 4096;
  constexpr int64_t kRows = kLimit / kWidth + 2;
  DeviceArray<Bf16> x(static_cast<size_t>(kRows * kWidth));
  const std::vector<float> last = NormalValues(kWidth, 1.0f, 7);
  const std::vector<float> weight = NormalValues(kWidth, 1.0f, 8);
  const auto last_row = static_cast<size_t>((kRows - 1) * kWidth);
  x.Write(last_row, ToBf16(last).data(), kWidth);
  std::vector<float> expected(kWidth);

  const DeviceArray<Bf16> half(static_cast<size_t>(kRows * kWidth / 2));
  PREFILLD_ASSERT_CUDA(cuda::LaunchSwiGlu({x.data(), half.data(), kRows, kWidth / 2}, nullptr));
  reference::SwiGlu({last.data(), expected.data(), 1, kWidth / 2});
  ExpectClose(FromBf16(half.Read(last_row / 2, kWidth / 2)),
              {expected.begin(), expected.begin() + kWidth / 2});

  // The rows are taken as a projection of 16 query heads and 8 + 8 KV heads.
  const std::vector<float> inv_freq(kHeadDim / 2, 0.01f);
  const DeviceArray<float> device_inv_freq(inv_freq);
  DeviceArray<Bf16> q(static_cast<size_t>(kRows * kWidth / 2));
  DeviceArray<Bf16> k(static_cast<size_t>(kRows * kWidth / 4)), v(k.size());
  QkvRopeParams p;
  p.inv_freq = device_inv_freq.data();
  p.qkv = x.data();
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.num_tokens = kRows;
  p.kv_head_stride = kHeadDim;
  p.kv_token_stride = kWidth / 4;
  p.num_heads = 16;
  p.num_kv_heads = 8;
  p.head_dim = kHeadDim;
  PREFILLD_ASSERT_CUDA(cuda::LaunchQkvRope(p, nullptr));
  std::vector<float> expected_k(kWidth / 4), expected_v(kWidth / 4);
  QkvRopeParams last_only = p;
  last_only.inv_freq = inv_freq.data();
  last_only.qkv = last.data();
  last_only.q = expected.data();
  last_only.k = expected_k.data();
  last_only.v = expected_v.data();
  last_only.first_position = kRows - 1;
  last_only.num_tokens = 1;
  reference::QkvRope(last_only);
  ExpectClose(FromBf16(q.Read(last_row / 2, kWidth / 2)),
              {expected.begin(), expected.begin() + kWidth / 2});
  ExpectClose(FromBf16(k.Read(last_row / 4, kWidth / 4)), expected_k);
  EXPECT_EQ(FromBf16(v.Read(last_row / 4, kWidth / 4)), expected_v);

  const DeviceArray<Bf16> device_weight(ToBf16(weight));
  PREFILLD_ASSERT_CUDA(cuda::LaunchRmsNorm(
      {x.data(), device_weight.data(), x.data(), kRows, kWidth, 1e-6f}, nullptr));
  reference::RmsNorm({last.data(), weight.data(), expected.data(), 1, kWidth, 1e-6f});
  ExpectClose(FromBf16(x.Read(last_row, kWidth)), expected);
}

}  // namespace
}  // namespace prefilld::kernels::testing
