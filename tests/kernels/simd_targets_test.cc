// Runs the ops once on every instruction set that they are compiled for and this machine has. The
// other tests run on the best one only.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/cpu/simd_targets.h"
// simd_targets.h comes before Highway.
#include "hwy/highway.h"
#include "hwy/targets.h"
#include "kernels/cpu/ops.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_attention.h"
#include "tests/kernels/reference_layer_ops.h"
#include "tests/kernels/reference_pattern.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

class EveryInstructionSet : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }

  static void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected) {
    const Closeness c = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(c.wrong_non_finite, 0u);
    EXPECT_LT(c.relative, 5e-6) << c;
  }
};

TEST_P(EveryInstructionSet, Attention) {
  constexpr AttentionCase kCase = {"", 200, 300, 4, 2, 80, 64, Blocks::kMixed};
  AttentionData actual(kCase), expected(kCase);
  cpu::Attention(actual.params);
  reference::Attention(expected.params);
  ExpectClose(actual.out, expected.out);
}

TEST_P(EveryInstructionSet, PagedAttention) {
  const Qkv data = MakeQkv(1, 700, 2, 1, 80, 1);
  std::vector<int32_t> table(CeilDiv(700, 32));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::vector<float> scratch(static_cast<size_t>(PagedAttentionScratchFloats(2, 80)));
  std::vector<float> actual(2 * 80), expected(2 * 80);
  PagedAttentionParams p;
  p.q = data.q.data();
  p.k_pool = data.k.data();
  p.v_pool = data.v.data();
  p.block_table = table.data();
  p.out = actual.data();
  p.num_keys = 700;
  p.block_stride = 32 * 80;
  p.token_stride = 80;
  p.num_heads = 2;
  p.num_kv_heads = 1;
  p.head_dim = 80;
  p.block_tokens = 32;
  p.scale = 0.1f;
  p.scratch = scratch.data();
  cpu::PagedAttention(p);
  p.out = expected.data();
  reference::PagedAttention(p);
  ExpectClose(actual, expected);
}

TEST_P(EveryInstructionSet, Estimate) {
  const Qkv data = MakeQkv(64, 200, 2, 1, 32, 1);
  std::vector<char> scratch(static_cast<size_t>(EstimateScratchBytes(2, 200, 64)));
  const auto run = [&](void (*op)(const EstimateParams&)) {
    std::vector<float> out(2 * (4 + 200 + 200));
    EstimateParams p{data.q.data(), data.k.data(), 64, 200, 200 * 32, 2, 1, 32, 64, 0.2f};
    p.block_mass = out.data();
    p.vertical = out.data() + 8;
    p.slash = out.data() + 408;
    p.scratch = scratch.data();
    op(p);
    return out;
  };
  ExpectClose(run(cpu::Estimate), run(reference::Estimate));
}

TEST_P(EveryInstructionSet, LayerOps) {
  const std::vector<float> x = MakeQkv(3, 3, 4, 1, 64, 1).q;    // [3, 256]
  const std::vector<float> w = MakeQkv(1, 40, 1, 1, 256, 2).k;  // [40, 256]
  const auto run = [&](auto rms_norm, auto swiglu, auto linear, auto rope) {
    std::vector<float> out(2000);
    rms_norm(RmsNormParams{x.data(), w.data(), out.data(), 3, 253, 1e-6f});
    swiglu(SwiGluParams{x.data(), out.data() + 768, 3, 125});
    linear(LinearParams{x.data(), w.data(), nullptr, out.data() + 1200, 3, 253, 40, false});
    QkvRopeParams p;
    p.qkv = x.data();
    p.q_norm = w.data();
    p.inv_freq = w.data();
    p.q = out.data() + 1400;
    p.k = out.data() + 1600;
    p.v = out.data() + 1800;
    p.num_tokens = 3;
    p.first_position = 11;
    p.kv_head_stride = p.kv_token_stride = 20;
    p.num_heads = p.num_kv_heads = 1;
    p.head_dim = 20;
    rope(p);
    return out;
  };
  ExpectClose(run(cpu::RmsNorm, cpu::SwiGlu, cpu::Linear, cpu::QkvRope),
              run(reference::RmsNorm, reference::SwiGlu, reference::Linear, reference::QkvRope));
}

TEST_P(EveryInstructionSet, PackKv) {
  const std::vector<float> k = MakeQkv(1, 50, 1, 2, 32, 1).k;
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    const auto run = [&](void (*op)(const PackKvParams&)) {
      std::vector<uint16_t> packed(2 * 4 * 16 * 2 * 32);
      PackKvParams p{k.data(), k.data(), 50 * 32, 50, 0, 4, 16, 0, 2, 32};
      p.dst_dtype = dtype;
      p.dst = packed.data();
      op(p);
      return packed;
    };
    EXPECT_EQ(run(cpu::PackKv), run(reference::PackKv));
  }
  std::vector<uint16_t> bf16_k;
  for (const float x : k) bf16_k.push_back(reference::ToBf16(x));
  for (const KvScales scales : {KvScales::kPerToken, KvScales::kPerBlock}) {
    for (const bool is_bf16 : {false, true}) {
      const auto run = [&](void (*op)(const PackKvParams&)) {
        PackKvParams p{k.data(), k.data(), 50 * 32, 50, 0, 4, 16, 0, 2, 32};
        p.scales = scales;
        if (is_bf16) {
          p.src_dtype = DType::kBf16;
          p.k = p.v = bf16_k.data();
        }
        std::vector<uint8_t> packed(static_cast<size_t>(PackedBytes(p)));
        p.dst = packed.data();
        op(p);
        return packed;
      };
      EXPECT_EQ(run(cpu::PackKv), run(reference::PackKv));
    }
  }
}

std::string TargetName(const ::testing::TestParamInfo<int64_t>& info) {
  return hwy::TargetName(info.param);
}

INSTANTIATE_TEST_SUITE_P(Targets, EveryInstructionSet,
                         ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()), TargetName);

}  // namespace
}  // namespace prefilld::kernels::testing
