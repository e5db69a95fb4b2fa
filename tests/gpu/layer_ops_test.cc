#include "kernels/cuda/layer_ops.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cuda/linear.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

// The output is rounded to bf16 once: 2^-9 at most, 2^-10.6 on average.
constexpr double kRelativeTolerance = 3e-3;

std::vector<float> Normal(int64_t count, uint32_t seed) {
  return NormalValues(static_cast<size_t>(count), 1.0f, seed);
}

// cuBLAS may round a product before it adds bias and residual.
constexpr double kLinearTolerance = 6e-3;

void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected,
                 double tolerance = kRelativeTolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  const Closeness c = Compare(actual.data(), expected.data(), actual.size());
  EXPECT_EQ(c.wrong_non_finite, 0u);
  EXPECT_LT(c.relative, tolerance) << c;
}

class CudaLayerOps : public GpuTest {};

TEST_F(CudaLayerOps, EmbeddingCopiesRows) {
  for (const int64_t hidden : {8, 24, 3584}) {
    const std::vector<float> table = Normal(50 * hidden, 1);
    for (const int64_t n : {1, 100}) {
      std::vector<uint32_t> ids(static_cast<size_t>(n));
      for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<uint32_t>(i * 37 % 50);
      const DeviceArray<uint32_t> device_ids(ids);
      const DeviceArray<Bf16> device_table(ToBf16(table));
      const DeviceArray<Bf16> y(static_cast<size_t>(n * hidden));
      std::vector<float> expected(y.size());
      PREFILLD_ASSERT_CUDA(cuda::LaunchEmbedding(
          {device_ids.data(), device_table.data(), y.data(), n, hidden}, nullptr));
      reference::Embedding({ids.data(), table.data(), expected.data(), n, hidden});
      EXPECT_EQ(FromBf16(y.Read()), expected);
    }
  }
}

TEST_F(CudaLayerOps, RmsNormEqualsReferenceAlsoInPlace) {
  for (const int64_t hidden : {8, 64, 104, 3584, 8192}) {
    const std::vector<float> x = Normal(5 * hidden, 1);
    const std::vector<float> weight = Normal(hidden, 2);
    const DeviceArray<Bf16> in_place(ToBf16(x));
    const DeviceArray<Bf16> device_weight(ToBf16(weight));
    std::vector<float> expected(x.size());
    PREFILLD_ASSERT_CUDA(cuda::LaunchRmsNorm(
        {in_place.data(), device_weight.data(), in_place.data(), 5, hidden, 1e-5f}, nullptr));
    reference::RmsNorm({x.data(), weight.data(), expected.data(), 5, hidden, 1e-5f});
    ExpectClose(FromBf16(in_place.Read()), expected);
  }
}

TEST_F(CudaLayerOps, SwiGluEqualsReferenceAlsoForLargeGates) {
  for (const int64_t intermediate : {8, 64, 336, 18944}) {
    std::vector<float> gate_up = Normal(3 * 2 * intermediate, 1);
    gate_up[0] = -1000.0f;
    gate_up[static_cast<size_t>(2 * intermediate)] = 1000.0f;
    gate_up[static_cast<size_t>(4 * intermediate)] = -87.0f;
    const DeviceArray<Bf16> device_gate_up(ToBf16(gate_up));
    const DeviceArray<Bf16> y(static_cast<size_t>(3 * intermediate));
    std::vector<float> expected(y.size());
    PREFILLD_ASSERT_CUDA(
        cuda::LaunchSwiGlu({device_gate_up.data(), y.data(), 3, intermediate}, nullptr));
    reference::SwiGlu({gate_up.data(), expected.data(), 3, intermediate});
    ExpectClose(FromBf16(y.Read()), expected);
  }
}

TEST_F(CudaLayerOps, TokenLogprobsEqualReferenceForAnyVocabulary) {
  for (const int64_t vocab_size : {1, 2, 31, 264, 5001, 151936}) {
    std::vector<float> logits = Normal(4 * vocab_size, 1);
    for (float& logit : logits) logit *= 10.0f;
    const auto last = static_cast<uint32_t>(vocab_size - 1);
    logits[0] = 3008.0f;  // its exponential overflows
    // The largest logit leads by the smallest step of bf16 in the second row; in the fourth two are
    // equal.
    logits[vocab_size] = 59.75f;
    logits[vocab_size + last] = 60.0f;
    logits[3 * vocab_size] = logits[3 * vocab_size + last] = 60.0f;
    logits = FromBf16(ToBf16(logits));
    const std::vector<uint32_t> targets = {0, last, last / 2, 0};
    const DeviceArray<Bf16> device_logits(ToBf16(logits));
    const DeviceArray<uint32_t> device_targets(targets);
    const DeviceArray<float> out(8);
    std::vector<float> expected(8);
    PREFILLD_ASSERT_CUDA(cuda::LaunchTokenLogprobs(
        {device_logits.data(), device_targets.data(), out.data(), out.data() + 4, 4, vocab_size},
        nullptr));
    reference::TokenLogprobs(
        {logits.data(), targets.data(), expected.data(), expected.data() + 4, 4, vocab_size});
    const std::vector<float> actual = out.Read();
    for (size_t i = 0; i < 8; ++i) {
      EXPECT_NEAR(actual[i], expected[i], 1e-4f * std::max(1.0f, std::abs(expected[i])))
          << vocab_size << ", " << i;
    }
    for (const size_t row : {0, 1, 3}) {
      EXPECT_EQ(actual[row], actual[4 + row]) << "the target is the likeliest, row " << row;
    }
    if (vocab_size > 1) {
      EXPECT_LT(actual[1], -0.5f) << "a sum that is not exact";
      EXPECT_LT(actual[3], -0.5f);
    }
  }
}

TEST_F(CudaLayerOps, LinearEqualsReferenceWithBiasAndAccumulation) {
  const DeviceArray<char> workspace(cuda::LinearLauncher::kWorkspaceBytes);
  cuda::LinearLauncher launcher;
  ASSERT_EQ(launcher.Initialize(workspace.data(), workspace.size()), CUBLAS_STATUS_SUCCESS);
  for (const int64_t num_tokens : {1, 2, 17, 130}) {
    for (const auto& [in, out] :
         {std::pair<int64_t, int64_t>{8, 8}, {40, 24}, {256, 100}, {512, 1536}}) {
      for (const bool with_bias : {false, true}) {
        for (const bool accumulate : {false, true}) {
          const std::vector<float> x = Normal(num_tokens * in, 1);
          const std::vector<float> w = Normal(out * in, 2);
          const std::vector<float> bias = Normal(out, 3);
          std::vector<float> expected = Normal(num_tokens * out, 4);
          const DeviceArray<Bf16> device_x(ToBf16(x)), device_w(ToBf16(w)),
              device_bias(ToBf16(bias)), y(ToBf16(expected));
          LinearParams p{device_x.data(),
                         device_w.data(),
                         with_bias ? device_bias.data() : nullptr,
                         y.data(),
                         num_tokens,
                         in,
                         out,
                         accumulate};
          // If nothing accumulates, the op runs twice: the second time it uses the remembered
          // algorithm.
          for (int i = 0; i < (accumulate ? 1 : 2); ++i) {
            ASSERT_EQ(launcher.Launch(p, nullptr), CUBLAS_STATUS_SUCCESS)
                << num_tokens << ", " << in << " -> " << out;
          }
          reference::Linear({x.data(), w.data(), with_bias ? bias.data() : nullptr, expected.data(),
                             num_tokens, in, out, accumulate});
          SCOPED_TRACE(::testing::Message()
                       << num_tokens << " tokens, " << in << " -> " << out << ", bias " << with_bias
                       << ", accumulate " << accumulate);
          ExpectClose(FromBf16(y.Read()), expected, kLinearTolerance);
        }
      }
    }
  }
}

TEST_F(CudaLayerOps, TunedLinearEqualsReferenceForFewerAndMoreTokens) {
  const DeviceArray<char> workspace(cuda::LinearLauncher::kWorkspaceBytes);
  constexpr int64_t kIn = 512;
  constexpr int64_t kOut = 1536;
  constexpr int64_t kTunedTokens = 256;
  constexpr int64_t kMostTokens = 300;
  const std::vector<float> x = Normal(kMostTokens * kIn, 1);
  const std::vector<float> w = Normal(kOut * kIn, 2);
  const std::vector<float> bias = Normal(kOut, 3);
  const std::vector<float> before = Normal(kMostTokens * kOut, 4);
  const DeviceArray<Bf16> device_x(ToBf16(x)), device_w(ToBf16(w)), device_bias(ToBf16(bias));
  for (const bool accumulate : {false, true}) {
    cuda::LinearLauncher launcher;
    ASSERT_EQ(launcher.Initialize(workspace.data(), workspace.size()), CUBLAS_STATUS_SUCCESS);
    const auto params = [&](const DeviceArray<Bf16>& y, int64_t num_tokens) {
      return LinearParams{
          device_x.data(), device_w.data(), device_bias.data(), y.data(), num_tokens, kIn, kOut,
          accumulate};
    };
    const DeviceArray<Bf16> overwritten(ToBf16(before));
    EXPECT_FALSE(launcher.IsTuned(cuda::ShapeOf(params(overwritten, kTunedTokens))));
    ASSERT_EQ(launcher.Tune(params(overwritten, kTunedTokens), nullptr), CUBLAS_STATUS_SUCCESS);
    for (const int64_t num_tokens : {int64_t{1}, kTunedTokens / 4 - 1, kTunedTokens / 4,
                                     int64_t{100}, kTunedTokens, kMostTokens}) {
      SCOPED_TRACE(::testing::Message() << num_tokens << " tokens, accumulate " << accumulate);
      const DeviceArray<Bf16> y(ToBf16(before));
      EXPECT_EQ(launcher.IsTuned(cuda::ShapeOf(params(y, num_tokens))),
                num_tokens >= kTunedTokens / 4);
      ASSERT_EQ(launcher.Launch(params(y, num_tokens), nullptr), CUBLAS_STATUS_SUCCESS);
      std::vector<float> expected = before;
      reference::Linear(
          {x.data(), w.data(), bias.data(), expected.data(), num_tokens, kIn, kOut, accumulate});
      ExpectClose(FromBf16(y.Read()), expected, kLinearTolerance);
    }
    // Algorithms of untuned shapes come and go, but tuned ones stay.
    const DeviceArray<Bf16> y(ToBf16(before));
    for (int64_t num_tokens = 1; num_tokens <= kMostTokens; ++num_tokens) {
      for (const int64_t out : {kOut, kOut - 8}) {
        LinearParams other = params(y, num_tokens);
        other.out_features = out;
        ASSERT_EQ(launcher.Launch(other, nullptr), CUBLAS_STATUS_SUCCESS);
      }
    }
    EXPECT_TRUE(launcher.IsTuned(cuda::ShapeOf(params(y, kTunedTokens))));
  }
}

struct RopeCase {
  int64_t num_tokens;
  int64_t first_position;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  bool norms;
  bool token_major_kv;  // a paged cache's block; otherwise head-major
};

TEST_F(CudaLayerOps, QkvRopeEqualsReference) {
  const RopeCase cases[] = {
      {1, 0, 2, 1, 64, false, false},          {1, 4095, 7, 1, 64, true, true},
      {31, 0, 4, 2, 128, true, false},         {33, 1000, 4, 4, 64, false, false},
      {100, 1'000'000, 2, 2, 64, true, false}, {70, 16'000'000, 2, 1, 128, false, true},
      {9, 5, 3, 1, 128, true, false},          {5, 70, 5, 1, 64, false, true},
  };
  for (const RopeCase& c : cases) {
    const std::vector<float> qkv =
        Normal(c.num_tokens * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, 1);
    const std::vector<float> q_norm = Normal(c.head_dim, 2);
    const std::vector<float> k_norm = Normal(c.head_dim, 3);
    std::vector<float> inv_freq(static_cast<size_t>(c.head_dim / 2));
    for (size_t i = 0; i < inv_freq.size(); ++i) {
      inv_freq[i] =
          std::pow(500000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(c.head_dim));
    }
    // The cache has room for five more tokens, which must stay as they are.
    const int64_t capacity = c.num_tokens + 5;
    std::vector<float> q(static_cast<size_t>(c.num_tokens * c.num_heads * c.head_dim));
    std::vector<float> k(static_cast<size_t>(c.num_kv_heads * capacity * c.head_dim), 9.0f);
    std::vector<float> v = k;
    const DeviceArray<Bf16> device_qkv(ToBf16(qkv)), device_q_norm(ToBf16(q_norm)),
        device_k_norm(ToBf16(k_norm)), device_q(q.size()), device_k(ToBf16(k)), device_v(ToBf16(v));
    const DeviceArray<float> device_inv_freq(inv_freq);
    QkvRopeParams p;
    p.num_tokens = c.num_tokens;
    p.first_position = c.first_position;
    p.kv_head_stride = c.token_major_kv ? c.head_dim : capacity * c.head_dim;
    p.kv_token_stride = c.token_major_kv ? c.num_kv_heads * c.head_dim : c.head_dim;
    p.num_heads = c.num_heads;
    p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim;
    p.attention_factor = 1.2f;
    QkvRopeParams on_device = p;
    p.qkv = qkv.data();
    p.q_norm = c.norms ? q_norm.data() : nullptr;
    p.k_norm = c.norms ? k_norm.data() : nullptr;
    p.inv_freq = inv_freq.data();
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    reference::QkvRope(p);
    on_device.qkv = device_qkv.data();
    on_device.q_norm = c.norms ? device_q_norm.data() : nullptr;
    on_device.k_norm = c.norms ? device_k_norm.data() : nullptr;
    on_device.inv_freq = device_inv_freq.data();
    on_device.q = device_q.data();
    on_device.k = device_k.data();
    on_device.v = device_v.data();
    PREFILLD_ASSERT_CUDA(cuda::LaunchQkvRope(on_device, nullptr));
    ExpectClose(FromBf16(device_q.Read()), q);
    ExpectClose(FromBf16(device_k.Read()), k);
    EXPECT_EQ(FromBf16(device_v.Read()), v);
  }
}

// Positions given token by token yield bit for bit what first_position yields prompt by prompt.
TEST_F(CudaLayerOps, QkvRopeTakesPositionsTokenByToken) {
  constexpr int64_t kTokens = 203;
  constexpr int kHeadDim = 64;
  constexpr int64_t kStarts[] = {0, 1, 66, 128, kTokens};  // of prompts
  const DeviceArray<Bf16> qkv(ToBf16(Normal(kTokens * 3 * kHeadDim, 1)));
  std::vector<float> inv_freq_host(kHeadDim / 2);
  for (size_t i = 0; i < inv_freq_host.size(); ++i) {
    inv_freq_host[i] = std::pow(500000.0f, -2.0f * static_cast<float>(i) / kHeadDim);
  }
  const DeviceArray<float> inv_freq(inv_freq_host);
  std::vector<int32_t> positions_host;
  for (int prompt = 0; prompt < 4; ++prompt) {
    for (int64_t i = 0; i < kStarts[prompt + 1] - kStarts[prompt]; ++i) {
      positions_host.push_back(static_cast<int32_t>(i));
    }
  }
  const DeviceArray<int32_t> positions(positions_host);
  const size_t elements = kTokens * kHeadDim;
  const auto expect_equal = [](const std::vector<Bf16>& a, const std::vector<Bf16>& b) {
    EXPECT_EQ(FromBf16(a), FromBf16(b));
  };
  QkvRopeParams p = {.inv_freq = inv_freq.data(),
                     .kv_head_stride = static_cast<int64_t>(elements),
                     .kv_token_stride = kHeadDim,
                     .num_heads = 1,
                     .num_kv_heads = 1,
                     .head_dim = kHeadDim};
  const DeviceArray<Bf16> q(elements), k(elements), v(elements);
  const DeviceArray<Bf16> q_apart(elements), k_apart(elements), v_apart(elements);
  QkvRopeParams together = p;
  together.qkv = qkv.data();
  together.positions = positions.data();
  together.q = q.data();
  together.k = k.data();
  together.v = v.data();
  together.num_tokens = kTokens;
  PREFILLD_ASSERT_CUDA(cuda::LaunchQkvRope(together, nullptr));
  for (int prompt = 0; prompt < 4; ++prompt) {
    const int64_t offset = kStarts[prompt] * kHeadDim;
    p.qkv = qkv.data() + 3 * offset;
    p.q = q_apart.data() + offset;
    p.k = k_apart.data() + offset;
    p.v = v_apart.data() + offset;
    p.num_tokens = kStarts[prompt + 1] - kStarts[prompt];
    PREFILLD_ASSERT_CUDA(cuda::LaunchQkvRope(p, nullptr));
  }
  expect_equal(q.Read(), q_apart.Read());
  expect_equal(k.Read(), k_apart.Read());
  expect_equal(v.Read(), v_apart.Read());
}

TEST_F(CudaLayerOps, RefuseWhatTheyHaveNoKernelFor) {
  EXPECT_EQ(cuda::LaunchEmbedding({.num_tokens = 1, .hidden = 12}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(cuda::LaunchRmsNorm({.num_tokens = 1, .hidden = 12}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(cuda::LaunchSwiGlu({.num_tokens = 1, .intermediate = 12}, nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(cuda::LaunchQkvRope({.num_tokens = 1, .head_dim = 80}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace prefilld::kernels::testing
