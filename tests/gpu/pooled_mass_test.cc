#include "kernels/cuda/pattern.h"

#include <vector>

#include "kernels/attention.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_pattern.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

class CudaPooledMass : public GpuTestWithParam<EstimateCase> {};

TEST_P(CudaPooledMass, EqualsReferenceForEveryHead) {
  const EstimateCase& c = GetParam();
  const int64_t n = CeilDiv(c.num_keys, c.block_tokens);
  const Qkv data = MakeQkv(c.num_keys, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 3);
  const DeviceArray<Bf16> q(ToBf16(data.q)), k(ToBf16(data.k));
  PooledMassParams p = {.num_tokens = c.num_keys,
                        .kv_head_stride = c.num_keys * c.head_dim,
                        .num_heads = c.num_heads,
                        .num_kv_heads = c.num_kv_heads,
                        .head_dim = c.head_dim,
                        .block_tokens = c.block_tokens,
                        .scale = 0.125f};
  for (p.head = 0; p.head < c.num_heads; ++p.head) {
    std::vector<float> expected(n * n);
    p.q = data.q.data();
    p.k = data.k.data();
    p.block_mass = expected.data();
    reference::PooledMass(p);

    const DeviceArray<float> scratch(2 * n * c.head_dim), mass(n * n);
    p.q = q.data();
    p.k = k.data();
    p.block_mass = mass.data();
    p.scratch = scratch.data();
    PREFILLD_ASSERT_CUDA(cuda::LaunchPooledMass(p, nullptr));
    const std::vector<float> actual = mass.Read();
    const Closeness closeness = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(closeness.wrong_non_finite, 0u);
    EXPECT_LT(closeness.max_absolute, 1e-4) << "head " << p.head << ": " << closeness;
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CudaPooledMass, ::testing::ValuesIn(EstimateCases()),
                         CaseName<::testing::TestParamInfo<EstimateCase>>);

class CudaPooledMassLaunch : public GpuTest {};

TEST_F(CudaPooledMassLaunch, RefusesHeadDimsItIsNotBuiltFor) {
  const DeviceArray<float> memory(1024);
  PooledMassParams p = {.q = memory.data(),
                        .k = memory.data(),
                        .num_tokens = 1,
                        .num_heads = 1,
                        .num_kv_heads = 1,
                        .block_mass = memory.data(),
                        .scratch = memory.data()};
  for (const int head_dim : {0, 80, 512}) {
    p.head_dim = head_dim;
    EXPECT_EQ(cuda::LaunchPooledMass(p, nullptr), cudaErrorInvalidValue) << head_dim;
  }
}

}  // namespace
}  // namespace prefilld::kernels::testing
