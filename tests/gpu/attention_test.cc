#include "kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/attention_part.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_attention.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

// Probabilities and outputs are rounded to bf16, with an error of 2^-9 each at most.
constexpr double kRelativeTolerance = 5e-3;
constexpr double kMassTolerance = 1e-3;

using cuda::KernelPath;
constexpr KernelPath kPaths[] = {KernelPath::kFastest, KernelPath::kPortable};
const char* Name(KernelPath path) {
  return path == KernelPath::kFastest ? "fastest path" : "portable path";
}

// An attention case on the device. `host` keeps the fp32 copy for the reference.
class DeviceAttention {
 public:
  explicit DeviceAttention(const AttentionCase& c)
      : host(c),
        q_(ToBf16(host.qkv.q)),
        k_(ToBf16(host.qkv.k)),
        v_(ToBf16(host.qkv.v)),
        out_(host.out.size()),
        work_(host.work) {
    for (HeadWork& work : work_) {
      work.pattern = Copy(work.pattern, host.num_query_blocks * PatternWords(host.num_key_blocks));
      work.last_row = Copy(work.last_row, PatternWords(host.num_key_blocks));
      masses_.emplace_back(work.block_mass == nullptr
                               ? 0
                               : static_cast<size_t>(host.num_query_blocks * host.num_key_blocks));
      if (work.block_mass != nullptr) work.block_mass = masses_.back().data();
    }
    params = host.params;
    params.q = q_.data();
    params.k = k_.data();
    params.v = v_.data();
    params.out = out_.data();
    params.work = work_.data();
  }

  void Run(KernelPath path = KernelPath::kFastest) { Launch(params, path); }
  // Computes parts one after the other: of one query block, of three, and so on.
  void RunParts(KernelPath path) {
    std::vector<HeadWork> work(work_.size());
    int64_t end = 0;
    for (int64_t blocks = 1; end < host.num_query_blocks; blocks += 2) {
      const int64_t first = end;
      end = std::min(first + blocks, host.num_query_blocks);
      Launch(PartOf(params, first, end, sizeof(Bf16), work.data()), path);
    }
  }
  std::vector<float> Out() const {
    const bool in_place = params.out == params.q;
    return FromBf16(in_place ? q_.Read() : out_.Read());
  }
  std::vector<float> Mass(size_t work) const { return masses_[work].Read(); }

  AttentionData host;
  AttentionParams params;

 private:
  static void Launch(const AttentionParams& params, KernelPath path) {
    const DeviceArray<char> scratch(static_cast<size_t>(cuda::AttentionScratchBytes(params, path)));
    PREFILLD_ASSERT_CUDA(cuda::LaunchAttention(params, scratch.data(), nullptr, path));
    PREFILLD_ASSERT_CUDA(cudaDeviceSynchronize());
  }
  const uint32_t* Copy(const uint32_t* words, int64_t count) {
    if (words == nullptr) return nullptr;
    patterns_.emplace_back(std::vector<uint32_t>(words, words + count));
    return patterns_.back().data();
  }

  DeviceArray<Bf16> q_, k_, v_, out_;
  std::vector<HeadWork> work_;
  std::vector<DeviceArray<uint32_t>> patterns_;
  std::vector<DeviceArray<float>> masses_;
};

void ExpectMassEqualsReference(const DeviceAttention& device, const AttentionData& expected) {
  for (size_t i = 0; i < expected.work.size(); ++i) {
    if (expected.work[i].block_mass == nullptr) continue;
    const std::vector<float> mass = device.Mass(i);
    const Closeness c = Compare(mass.data(), expected.work[i].block_mass, mass.size());
    EXPECT_EQ(c.wrong_non_finite, 0u);
    EXPECT_LT(c.max_absolute, kMassTolerance) << "head " << expected.work[i].head;
    for (int64_t row = 0; row < expected.num_query_blocks; ++row) {
      const int64_t diagonal = expected.num_key_blocks - expected.num_query_blocks + row;
      for (int64_t block = diagonal + 1; block < expected.num_key_blocks; ++block) {
        EXPECT_EQ(mass[static_cast<size_t>(row * expected.num_key_blocks + block)], 0.0f);
      }
    }
  }
}

class CudaAttention : public GpuTestWithParam<AttentionCase> {};

TEST_P(CudaAttention, EqualsReference) {
  AttentionData expected(GetParam());
  reference::Attention(expected.params);
  for (const KernelPath path : kPaths) {
    SCOPED_TRACE(Name(path));
    DeviceAttention device(GetParam());
    device.Run(path);
    const std::vector<float> out = device.Out();
    const Closeness c = Compare(out.data(), expected.out.data(), out.size());
    EXPECT_EQ(c.wrong_non_finite, 0u);
    EXPECT_LT(c.relative, kRelativeTolerance) << c;
    EXPECT_GT(c.cosine, 0.9999) << c;
    ExpectMassEqualsReference(device, expected);
  }
}

TEST_P(CudaAttention, OfPartsGivesTheBitsOfTheWhole) {
  for (const KernelPath path : kPaths) {
    SCOPED_TRACE(Name(path));
    DeviceAttention whole(GetParam()), in_parts(GetParam());
    whole.Run(path);
    in_parts.RunParts(path);
    EXPECT_EQ(in_parts.Out(), whole.Out());
    for (size_t i = 0; i < whole.host.work.size(); ++i) EXPECT_EQ(in_parts.Mass(i), whole.Mass(i));
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CudaAttention, ::testing::ValuesIn(AttentionCases()),
                         CaseName<::testing::TestParamInfo<AttentionCase>>);
// These have more tiles than the kernel with block mass has CTAs, and more heads than one launch
// takes.
INSTANTIATE_TEST_SUITE_P(
    Large, CudaAttention,
    ::testing::Values(AttentionCase{"SeveralTilesPerCta", 1500, 1700, 24, 8, 64, 64,
                                    Blocks::kDenseWithMass},
                      AttentionCase{"SeveralWideTilesPerCta", 1500, 1700, 24, 8, 128, 128,
                                    Blocks::kDenseWithMass},
                      AttentionCase{"ManyHeads", 200, 200, 150, 2, 64, 64, Blocks::kMixed},
                      AttentionCase{"ManyWideHeads", 260, 260, 70, 7, 128, 128, Blocks::kMixed}),
    CaseName<::testing::TestParamInfo<AttentionCase>>);

constexpr AttentionCase kSmall = {"Small", 200, 300, 4, 2, 64, 128, Blocks::kMixed};

class CudaAttentionOp : public GpuTest {};

TEST_F(CudaAttentionOp, LeavesHeadsWithoutWorkUntouched) {
  for (const KernelPath path : kPaths) {
    DeviceAttention device(kSmall);
    device.params.num_work = 2;  // heads 3 and 2
    device.Run(path);
    const std::vector<float> out = device.Out();
    for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(std::isnan(out[i]), i / 64 % 4 < 2) << i;
  }
}

TEST_F(CudaAttentionOp, MayWriteOverItsQueries) {
  for (const KernelPath path : kPaths) {
    DeviceAttention apart(kSmall);
    DeviceAttention in_place(kSmall);
    apart.Run(path);
    in_place.params.out = const_cast<void*>(in_place.params.q);
    in_place.Run(path);
    EXPECT_EQ(in_place.Out(), apart.Out());
  }
}

TEST_F(CudaAttentionOp, FullPatternAndBlockMassGiveTheBitsOfDense) {
  for (const KernelPath path : kPaths) {
    for (const int head_dim : {64, 128}) {
      AttentionCase c = {"", 400, 400, 2, 1, head_dim, 128, Blocks::kDense};
      DeviceAttention dense(c);
      c.blocks = Blocks::kFull;
      DeviceAttention full(c);
      c.blocks = Blocks::kDenseWithMass;
      DeviceAttention pivot(c);
      dense.Run(path);
      full.Run(path);
      pivot.Run(path);
      EXPECT_EQ(dense.Out(), full.Out());
      EXPECT_EQ(dense.Out(), pivot.Out());
    }
  }
}

TEST_F(CudaAttentionOp, PatternWithoutBitsGivesTheBitsOfTheDiagonal) {
  for (const KernelPath path : kPaths) {
    for (const int head_dim : {64, 128}) {
      AttentionCase c = {"", 600, 700, 2, 1, head_dim, 128, Blocks::kDiagonalOnly};
      DeviceAttention diagonal(c);
      c.blocks = Blocks::kNoBits;
      DeviceAttention empty(c);
      diagonal.Run(path);
      empty.Run(path);
      EXPECT_EQ(empty.Out(), diagonal.Out()) << Name(path);
    }
  }
}

TEST_F(CudaAttentionOp, GivesTheSameBitsAgain) {
  for (const KernelPath path : kPaths) {
    DeviceAttention first({"", 900, 900, 8, 2, 128, 128, Blocks::kMixed});
    DeviceAttention second({"", 900, 900, 8, 2, 128, 128, Blocks::kMixed});
    first.Run(path);
    second.Run(path);
    EXPECT_EQ(first.Out(), second.Out());
    EXPECT_EQ(first.Mass(1), second.Mass(1));
  }
}

TEST_F(CudaAttentionOp, SurvivesLogitsFarApart) {
  const AttentionCase c = {"", 200, 300, 4, 2, 64, 128, Blocks::kMixed};
  AttentionData expected(c);
  expected.params.scale = 10.0f;
  reference::Attention(expected.params);
  for (const KernelPath path : kPaths) {
    DeviceAttention device(c);
    device.params.scale = 10.0f;
    device.Run(path);
    const std::vector<float> out = device.Out();
    const Closeness closeness = Compare(out.data(), expected.out.data(), out.size());
    EXPECT_EQ(closeness.wrong_non_finite, 0u);
    EXPECT_LT(closeness.relative, kRelativeTolerance) << closeness;
  }
}

TEST_F(CudaAttentionOp, RefusesWhatItHasNoKernelFor) {
  DeviceAttention device(kSmall);
  AttentionParams params = device.params;
  params.head_dim = 96;
  EXPECT_EQ(cuda::LaunchAttention(params, nullptr, nullptr), cudaErrorInvalidValue);
  params = device.params;
  params.block_tokens = 32;
  EXPECT_EQ(cuda::LaunchAttention(params, nullptr, nullptr), cudaErrorInvalidValue);
  // A head asks for block mass, and there is no scratch.
  EXPECT_EQ(cuda::LaunchAttention(device.params, nullptr, nullptr), cudaErrorInvalidValue);
}

class CudaPagedAttention : public GpuTestWithParam<PagedCase> {};

TEST_P(CudaPagedAttention, EqualsReferenceInBothOrders) {
  const PagedCase& c = GetParam();
  const Qkv data = MakeQkv(1, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 3);
  const int64_t blocks = CeilDiv(c.num_keys, c.block_tokens);
  // The sequence's blocks lie scattered in a pool whose other blocks are full of NaN.
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (int64_t b = 0; b < blocks; ++b) table[static_cast<size_t>(b)] = static_cast<int32_t>(2 * b);
  std::shuffle(table.begin(), table.end(), std::mt19937(5));
  for (const bool nhd : {true, false}) {
    PagedAttentionParams p;
    p.num_keys = c.num_keys;
    p.block_stride = int64_t{c.block_tokens} * c.num_kv_heads * c.head_dim;
    p.token_stride = nhd ? c.num_kv_heads * c.head_dim : c.head_dim;
    p.head_stride = nhd ? c.head_dim : c.block_tokens * c.head_dim;
    p.num_heads = c.num_heads;
    p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim;
    p.block_tokens = c.block_tokens;
    p.scale = 0.125f;
    std::vector<float> pools[2];
    for (int i = 0; i < 2; ++i) {
      pools[i].assign(static_cast<size_t>(2 * blocks * p.block_stride), NAN);
      const std::vector<float>& source = i == 0 ? data.k : data.v;
      for (int64_t t = 0; t < c.num_keys; ++t) {
        for (int64_t h = 0; h < c.num_kv_heads; ++h) {
          std::copy_n(source.data() + (h * c.num_keys + t) * c.head_dim, c.head_dim,
                      pools[i].data() +
                          table[static_cast<size_t>(t / c.block_tokens)] * p.block_stride +
                          h * p.head_stride + t % c.block_tokens * p.token_stride);
        }
      }
    }
    std::vector<float> expected(data.q.size());
    p.q = data.q.data();
    p.k_pool = pools[0].data();
    p.v_pool = pools[1].data();
    p.block_table = table.data();
    p.out = expected.data();
    reference::PagedAttention(p);

    const DeviceArray<Bf16> q(ToBf16(data.q)), k(ToBf16(pools[0])), v(ToBf16(pools[1]));
    const DeviceArray<int32_t> device_table(table);
    const DeviceArray<Bf16> out(data.q.size());
    const DeviceArray<float> scratch(
        static_cast<size_t>(PagedAttentionScratchFloats(c.num_heads, c.head_dim)));
    p.q = q.data();
    p.k_pool = k.data();
    p.v_pool = v.data();
    p.block_table = device_table.data();
    p.out = out.data();
    p.scratch = scratch.data();
    PREFILLD_ASSERT_CUDA(cuda::LaunchPagedAttention(p, nullptr));
    PREFILLD_ASSERT_CUDA(cudaDeviceSynchronize());
    const std::vector<float> actual = FromBf16(out.Read());
    const Closeness closeness = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(closeness.wrong_non_finite, 0u);
    EXPECT_LT(closeness.relative, kRelativeTolerance) << closeness;
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CudaPagedAttention, ::testing::ValuesIn(PagedCases()),
                         CaseName<::testing::TestParamInfo<PagedCase>>);

}  // namespace
}  // namespace prefilld::kernels::testing
