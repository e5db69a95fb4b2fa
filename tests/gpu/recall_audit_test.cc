#include "model/sparse/recall_audit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "model/device/device.h"
#include "model/sparse/head_estimate.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/reference_attention.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::model {
namespace {

using kernels::testing::AttentionCase;
using kernels::testing::AttentionData;
using kernels::testing::Blocks;
using kernels::testing::DeviceArray;
using kernels::testing::ToBf16;

class CudaRecallAudit : public kernels::testing::GpuTestWithParam<AttentionCase> {};

// Computes the recall of `head` by its definition: the mean over all queries of the exact mass
// inside its pattern.
double Recall(const AttentionData& data, int head) {
  const int64_t num_keys = data.params.num_keys;
  const int64_t block_tokens = data.params.block_tokens;
  const int64_t n = data.num_key_blocks;
  std::vector<float> block_mass(n * n);
  std::vector<float> out(data.out.size());
  const kernels::HeadWork dense = {.head = head, .block_mass = block_mass.data()};
  kernels::AttentionParams params = data.params;
  params.out = out.data();
  params.work = &dense;
  params.num_work = 1;
  kernels::reference::Attention(params);
  const int64_t words = kernels::PatternWords(n);
  double mass = 0;
  for (int64_t row = 0; row < n; ++row) {
    const auto queries = static_cast<double>(std::min(block_tokens, num_keys - row * block_tokens));
    for (int64_t block = 0; block <= row; ++block) {
      uint32_t word = data.patterns[head][row * words + block / 32];
      if (row + 1 == n) word |= data.last_rows[head][block / 32];
      if (word >> (block % 32) & 1) mass += queries * block_mass[row * n + block];
    }
  }
  return mass / static_cast<double>(num_keys);
}

TEST_P(CudaRecallAudit, OfAllRowsIsTheTrueMassInsideThePatterns) {
  const AttentionCase& c = GetParam();
  AttentionData data(c);
  auto device = CreateCudaDevice();
  ASSERT_TRUE(device.ok()) << device.status();

  const DeviceArray<kernels::testing::Bf16> q(ToBf16(data.qkv.q)), k(ToBf16(data.qkv.k));
  std::vector<DeviceArray<uint32_t>> rows;
  std::vector<kernels::HeadWork> work(c.num_heads);
  for (int head = 0; head < c.num_heads; ++head) {
    rows.emplace_back(data.patterns[head]);
    work[head] = {.head = head, .pattern = rows.back().data()};
    rows.emplace_back(data.last_rows[head]);
    work[head].last_row = rows.back().data();
  }
  kernels::AttentionParams params = data.params;
  params.q = q.data();
  params.k = k.data();
  params.work = work.data();
  params.num_work = c.num_heads;
  auto estimate = HeadEstimate::Create(device->get(), c.num_heads, c.num_keys, c.block_tokens);
  ASSERT_TRUE(estimate.ok()) << estimate.status();
  auto audit = RecallAudit::Create(device->get(), c.num_heads);
  ASSERT_TRUE(audit.ok()) << audit.status();
  std::vector<float> recall(c.num_heads);
  const absl::Status status =
      (*audit)->Measure(params, 0, data.num_key_blocks, **estimate, absl::MakeSpan(recall));
  ASSERT_TRUE(status.ok()) << status;
  for (int head = 0; head < c.num_heads; ++head) {
    EXPECT_NEAR(recall[head], Recall(data, head), 1e-3) << "head " << head;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Prompts, CudaRecallAudit,
    ::testing::Values(
        AttentionCase{"WholeBlocks", 1024, 1024, 4, 2, 128, 128, Blocks::kLastRow},
        AttentionCase{"PartialLastBlock", 1000, 1000, 4, 2, 64, 128, Blocks::kLastRow},
        AttentionCase{"OneTokenInTheLastBlock", 1025, 1025, 2, 1, 128, 64, Blocks::kLastRow},
        AttentionCase{"ManyBlocks", 4500, 4500, 2, 1, 64, 64, Blocks::kLastRow}),
    kernels::testing::CaseName<::testing::TestParamInfo<AttentionCase>>);

}  // namespace
}  // namespace prefilld::model
