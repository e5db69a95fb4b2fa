#include "kernels/cpu/ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = normal(random);
  return x;
}

void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected) {
  const Closeness c = Compare(actual.data(), expected.data(), actual.size());
  EXPECT_EQ(c.wrong_non_finite, 0u);
  EXPECT_LT(c.relative, 1e-6) << c;
}

TEST(CpuEmbedding, CopiesRows) {
  const std::vector<float> table = Random(50 * 24, 1);
  for (const int64_t n : {1, 100}) {
    std::vector<uint32_t> ids(static_cast<size_t>(n));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<uint32_t>(i * 37 % 50);
    std::vector<float> actual(static_cast<size_t>(n * 24)), expected(actual.size());
    cpu::Embedding({ids.data(), table.data(), actual.data(), n, 24});
    reference::Embedding({ids.data(), table.data(), expected.data(), n, 24});
    EXPECT_EQ(actual, expected);
  }
}

TEST(CpuRmsNorm, EqualsReferenceAlsoInPlace) {
  for (const int64_t hidden : {1, 7, 64, 100, 3584}) {
    const std::vector<float> x = Random(5 * hidden, 1);
    const std::vector<float> weight = Random(hidden, 2);
    std::vector<float> actual = x, expected(x.size());
    cpu::RmsNorm({actual.data(), weight.data(), actual.data(), 5, hidden, 1e-5f});
    reference::RmsNorm({x.data(), weight.data(), expected.data(), 5, hidden, 1e-5f});
    ExpectClose(actual, expected);
  }
}

TEST(CpuLinear, EqualsReferenceWithBiasAndAccumulation) {
  for (const int64_t num_tokens : {1, 2, 4, 5, 17, 130}) {
    for (const auto& [in, out] : {std::pair<int64_t, int64_t>{1, 1}, {37, 19}, {256, 100}}) {
      for (const bool with_bias : {false, true}) {
        for (const bool accumulate : {false, true}) {
          const std::vector<float> x = Random(num_tokens * in, 1);
          const std::vector<float> w = Random(out * in, 2);
          const std::vector<float> bias = Random(out, 3);
          std::vector<float> actual = Random(num_tokens * out, 4);
          std::vector<float> expected = actual;
          LinearParams p{x.data(),      w.data(),   with_bias ? bias.data() : nullptr,
                         actual.data(), num_tokens, in,
                         out,           accumulate};
          cpu::Linear(p);
          p.y = expected.data();
          reference::Linear(p);
          ExpectClose(actual, expected);
        }
      }
    }
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

TEST(CpuQkvRope, EqualsReference) {
  const RopeCase cases[] = {
      {1, 0, 2, 1, 64, false, false},          {1, 4095, 7, 1, 64, true, true},
      {31, 0, 4, 2, 128, true, false},         {33, 1000, 4, 4, 16, false, false},
      {100, 1'000'000, 2, 2, 64, true, false}, {70, 16'000'000, 2, 1, 128, false, true},
  };
  for (const RopeCase& c : cases) {
    const std::vector<float> qkv =
        Random(c.num_tokens * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, 1);
    const std::vector<float> q_norm = Random(c.head_dim, 2);
    const std::vector<float> k_norm = Random(c.head_dim, 3);
    std::vector<float> inv_freq(static_cast<size_t>(c.head_dim / 2));
    for (size_t i = 0; i < inv_freq.size(); ++i) {
      inv_freq[i] =
          std::pow(500000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(c.head_dim));
    }
    const auto run = [&](void (*op)(const QkvRopeParams&)) {
      // The cache has room for five more tokens, which must stay as they are.
      const int64_t capacity = c.num_tokens + 5;
      std::vector<float> q(static_cast<size_t>(c.num_tokens * c.num_heads * c.head_dim));
      std::vector<float> k(static_cast<size_t>(c.num_kv_heads * capacity * c.head_dim), 9.0f);
      std::vector<float> v = k;
      QkvRopeParams p;
      p.qkv = qkv.data();
      p.q_norm = c.norms ? q_norm.data() : nullptr;
      p.k_norm = c.norms ? k_norm.data() : nullptr;
      p.inv_freq = inv_freq.data();
      p.q = q.data();
      p.k = k.data();
      p.v = v.data();
      p.num_tokens = c.num_tokens;
      p.first_position = c.first_position;
      p.kv_head_stride = c.token_major_kv ? c.head_dim : capacity * c.head_dim;
      p.kv_token_stride = c.token_major_kv ? c.num_kv_heads * c.head_dim : c.head_dim;
      p.num_heads = c.num_heads;
      p.num_kv_heads = c.num_kv_heads;
      p.head_dim = c.head_dim;
      p.attention_factor = 1.2f;
      op(p);
      q.insert(q.end(), k.begin(), k.end());
      q.insert(q.end(), v.begin(), v.end());
      return q;
    };
    ExpectClose(run(cpu::QkvRope), run(reference::QkvRope));
  }
}

// The runs of positions begin and end within a task and at its edges, and one tile begins within a
// run.
TEST(CpuQkvRope, TakesPositionsTokenByToken) {
  constexpr int64_t kTokens = 200;
  constexpr int kHeadDim = 64;
  std::vector<int32_t> positions;
  for (const auto& [first, count] : {std::pair(57, 7), {0, 25}, {0, 1}, {0, 31}, {90'000, 136}}) {
    for (int i = 0; i < count; ++i) positions.push_back(first + i);
  }
  ASSERT_EQ(positions.size(), static_cast<size_t>(kTokens));
  const std::vector<float> qkv = Random(kTokens * 3 * kHeadDim, 1);
  std::vector<float> inv_freq(kHeadDim / 2);
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    inv_freq[i] = std::pow(500000.0f, -2.0f * static_cast<float>(i) / kHeadDim);
  }
  const auto run = [&](void (*op)(const QkvRopeParams&)) {
    std::vector<float> q(kTokens * kHeadDim), k(q), v(q);
    op({.qkv = qkv.data(),
        .inv_freq = inv_freq.data(),
        .positions = positions.data(),
        .q = q.data(),
        .k = k.data(),
        .v = v.data(),
        .num_tokens = kTokens,
        .first_position = 5,  // not looked at
        .kv_head_stride = kTokens * kHeadDim,
        .kv_token_stride = kHeadDim,
        .num_heads = 1,
        .num_kv_heads = 1,
        .head_dim = kHeadDim});
    q.insert(q.end(), k.begin(), k.end());
    return q;
  };
  ExpectClose(run(cpu::QkvRope), run(reference::QkvRope));
}

TEST(CpuSwiGlu, EqualsReferenceAlsoForLargeGates) {
  for (const int64_t intermediate : {1, 15, 64, 333}) {
    std::vector<float> gate_up = Random(3 * 2 * intermediate, 1);
    gate_up[0] = -1000.0f;
    gate_up[static_cast<size_t>(2 * intermediate)] = 1000.0f;
    gate_up[static_cast<size_t>(4 * intermediate)] = -87.0f;
    std::vector<float> actual(static_cast<size_t>(3 * intermediate)), expected(actual.size());
    cpu::SwiGlu({gate_up.data(), actual.data(), 3, intermediate});
    reference::SwiGlu({gate_up.data(), expected.data(), 3, intermediate});
    ExpectClose(actual, expected);
  }
}

TEST(CpuGatedLinear, EqualsReference) {
  for (const int64_t num_tokens : {1, 2, 17, 130}) {
    for (const auto& [in, intermediate] : {std::pair<int64_t, int64_t>{1, 1}, {37, 19}, {64, 72}}) {
      const std::vector<float> x = Random(num_tokens * in, 1);
      const std::vector<float> w = Random(2 * intermediate * in, 2);
      std::vector<float> gate_up(static_cast<size_t>(num_tokens * 2 * intermediate));
      std::vector<float> actual(gate_up.size() / 2), expected(actual.size());
      GatedLinearParams p{x.data(),   w.data(), gate_up.data(), actual.data(),
                          num_tokens, in,       intermediate};
      cpu::GatedLinear(p);
      p.y = expected.data();
      reference::GatedLinear(p);
      ExpectClose(actual, expected);
    }
  }
}

TEST(CpuTokenLogprobs, EqualsReferenceAlsoForLargeLogits) {
  for (const int64_t vocab_size : {1, 2, 15, 264, 5000}) {
    std::vector<float> logits = Random(4 * vocab_size, 1);
    for (float& logit : logits) logit *= 30.0f;
    logits[0] = 3000.0f;  // its exponential overflows
    const std::vector<uint32_t> targets = {0, static_cast<uint32_t>(vocab_size - 1),
                                           static_cast<uint32_t>(vocab_size / 2), 0};
    const auto run = [&](void (*op)(const TokenLogprobsParams&)) {
      std::vector<float> out(8, 7.0f);
      op({logits.data(), targets.data(), out.data(), out.data() + 4, 4, vocab_size});
      return out;
    };
    ExpectClose(run(cpu::TokenLogprobs), run(reference::TokenLogprobs));
  }
}

TEST(CpuTokenLogprobs, AreExactlyEqualWhereTheTargetIsTheLikeliest) {
  std::vector<float> logits = Random(64 * 100, 3);
  std::vector<uint32_t> targets(64, 41);
  for (int64_t t = 0; t < 64; ++t) logits[static_cast<size_t>(t * 100 + 41)] = t % 2 ? 9.0f : -9.0f;
  std::vector<float> logprobs(64), best(64);
  cpu::TokenLogprobs({logits.data(), targets.data(), logprobs.data(), best.data(), 64, 100});
  for (size_t t = 0; t < 64; ++t) EXPECT_EQ(logprobs[t] == best[t], t % 2 == 1) << t;
}

}  // namespace
}  // namespace prefilld::kernels::testing
