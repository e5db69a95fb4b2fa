#include "kernels/cpu/pooled_mass.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/attention.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_pooled_mass.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

class CpuPooledMass : public ::testing::TestWithParam<EstimateCase> {};

TEST_P(CpuPooledMass, EqualsReferenceForEveryHead) {
  const EstimateCase& c = GetParam();
  const int64_t n = CeilDiv(c.num_keys, c.block_tokens);
  const Qkv data = MakeQkv(c.num_keys, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 3);
  std::vector<float> scratch(2 * n * c.head_dim), actual(n * n), expected(n * n);
  PooledMassParams p = {.q = data.q.data(),
                        .k = data.k.data(),
                        .num_tokens = c.num_keys,
                        .kv_head_stride = c.num_keys * c.head_dim,
                        .num_heads = c.num_heads,
                        .num_kv_heads = c.num_kv_heads,
                        .head_dim = c.head_dim,
                        .block_tokens = c.block_tokens,
                        .scale = 0.125f,
                        .scratch = scratch.data()};
  for (p.head = 0; p.head < c.num_heads; ++p.head) {
    p.block_mass = expected.data();
    reference::PooledMass(p);
    p.block_mass = actual.data();
    std::fill(actual.begin(), actual.end(), -1.0f);
    cpu::PooledMass(p);
    const Closeness closeness = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(closeness.wrong_non_finite, 0u);
    EXPECT_LT(closeness.max_absolute, 1e-5) << "head " << p.head << ": " << closeness;
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CpuPooledMass, ::testing::ValuesIn(EstimateCases()),
                         CaseName<::testing::TestParamInfo<EstimateCase>>);

}  // namespace
}  // namespace prefilld::kernels::testing
