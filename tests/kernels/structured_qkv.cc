#include "tests/kernels/structured_qkv.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace prefilld::kernels::testing {
namespace {

float RoundToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

// The place of each character's features: head_dim is cut into four quarters, for the sink, the
// position, the topic, and noise.
enum Quarter { kSink, kPosition, kTopic, kNoise };

void AddPosition(double position, double strength, int64_t quarter, float* to) {
  for (int64_t i = 0; i + 1 < quarter; i += 2) {
    const double angle = position * std::pow(0.6, static_cast<double>(i) / 2 + 1);
    to[kPosition * quarter + i] += static_cast<float>(strength * std::cos(angle));
    to[kPosition * quarter + i + 1] += static_cast<float>(strength * std::sin(angle));
  }
}

// Topics change about every 40 tokens and come back.
void AddTopic(int64_t position, double strength, int64_t quarter, float* to) {
  const int64_t topic = (position / 40) * 7 % 5;
  std::mt19937 random(static_cast<uint32_t>(topic));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < quarter; ++i) {
    to[kTopic * quarter + i] += static_cast<float>(strength) * normal(random);
  }
}

}  // namespace

Qkv MakeQkv(int64_t num_queries, int64_t num_keys, int num_heads, int num_kv_heads, int head_dim,
            uint32_t seed) {
  constexpr int64_t kSlashOffset = 75;
  const int64_t quarter = head_dim / 4;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Qkv data;
  data.q.resize(static_cast<size_t>(num_queries * num_heads * head_dim));
  data.k.resize(static_cast<size_t>(num_kv_heads * num_keys * head_dim));
  data.v.resize(data.k.size());
  for (float& x : data.q) x = 0.5f * normal(random);
  for (float& x : data.k) x = 0.5f * normal(random);
  for (float& x : data.v) x = normal(random);

  for (int64_t h = 0; h < num_kv_heads; ++h) {
    for (int64_t t = 0; t < num_keys; ++t) {
      float* k = data.k.data() + (h * num_keys + t) * head_dim;
      for (int64_t i = 0; t == 0 && i < quarter; ++i) k[kSink * quarter + i] += 3.0f;
      AddPosition(static_cast<double>(t), 2.0, quarter, k);
      AddTopic(t, 1.0, quarter, k);
    }
  }
  for (int64_t t = 0; t < num_queries; ++t) {
    const int64_t position = num_keys - num_queries + t;
    for (int64_t h = 0; h < num_heads; ++h) {
      float* q = data.q.data() + (t * num_heads + h) * head_dim;
      switch (h % 4) {
        case 0:
          for (int64_t i = 0; i < quarter; ++i) q[kSink * quarter + i] += 1.0f;
          break;
        case 1:
          AddPosition(static_cast<double>(position), 2.0, quarter, q);
          break;
        case 2:
          AddPosition(static_cast<double>(position - kSlashOffset), 2.0, quarter, q);
          break;
        default:
          AddTopic(position, 1.5, quarter, q);
      }
    }
  }
  for (std::vector<float>* tensor : {&data.q, &data.k, &data.v}) {
    for (float& x : *tensor) x = RoundToBf16(x);
  }
  return data;
}

std::vector<uint32_t> MakePattern(int64_t num_query_blocks, int64_t num_key_blocks, double density,
                                  uint32_t seed) {
  const int64_t words = PatternWords(num_key_blocks);
  std::vector<uint32_t> pattern(static_cast<size_t>(num_query_blocks * words));
  std::mt19937 random(seed);
  std::bernoulli_distribution chosen(density);
  for (int64_t r = 0; r < num_query_blocks; ++r) {
    const int64_t diagonal = num_key_blocks - num_query_blocks + r;
    for (int64_t c = 0; c <= diagonal; ++c) {
      if (chosen(random) || c == diagonal || (c == 0 && density > 0)) {
        pattern[static_cast<size_t>(r * words + c / 32)] |= 1u << (c % 32);
      }
    }
  }
  return pattern;
}

std::vector<uint32_t> MakePackedPattern(int64_t num_blocks) {
  constexpr int64_t kPromptBlocks[] = {1, 3, 1, 6, 2};
  const int64_t words = PatternWords(num_blocks);
  std::vector<uint32_t> pattern(static_cast<size_t>(num_blocks * words));
  int64_t first = 0;
  for (size_t prompt = 0; first < num_blocks; ++prompt) {
    const int64_t end = std::min(first + kPromptBlocks[prompt % 5], num_blocks);
    for (int64_t r = first; r < end; ++r) {
      for (int64_t c = first; c <= r; ++c) {
        pattern[static_cast<size_t>(r * words + c / 32)] |= 1u << (c % 32);
      }
    }
    first = end + (prompt % 3 == 1 ? 1 : 0);
  }
  return pattern;
}

AttentionData::AttentionData(const AttentionCase& c)
    : num_query_blocks(CeilDiv(c.num_keys, c.block_tokens) -
                       (c.num_keys - c.num_queries) / c.block_tokens),
      num_key_blocks(CeilDiv(c.num_keys, c.block_tokens)),
      qkv(MakeQkv(c.num_queries, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 1)),
      patterns(static_cast<size_t>(c.num_heads)),
      last_rows(static_cast<size_t>(c.num_heads)),
      block_mass(static_cast<size_t>(c.num_heads)),
      work(static_cast<size_t>(c.num_heads)),
      out(qkv.q.size(), std::numeric_limits<float>::quiet_NaN()) {
  constexpr double kDensity = 0.3;
  for (int h = 0; h < c.num_heads; ++h) {
    const auto i = static_cast<size_t>(h);
    const auto seed = static_cast<uint32_t>(100 + h);
    Blocks blocks = c.blocks;
    if (blocks == Blocks::kMixed) {
      constexpr Blocks kMix[] = {Blocks::kDense, Blocks::kDenseWithMass, Blocks::kRandom,
                                 Blocks::kLastRow};
      blocks = kMix[h % 4];
    }
    switch (blocks) {
      case Blocks::kDenseWithMass:
        block_mass[i].resize(static_cast<size_t>(num_query_blocks * num_key_blocks), -1.0f);
        break;
      case Blocks::kLastRow: {
        const std::vector<uint32_t> other = MakePattern(1, num_key_blocks, kDensity, seed + 1000);
        last_rows[i] = other;
        patterns[i] = MakePattern(num_query_blocks, num_key_blocks, kDensity, seed);
        break;
      }
      case Blocks::kRandom:
        patterns[i] = MakePattern(num_query_blocks, num_key_blocks, kDensity, seed);
        break;
      case Blocks::kDiagonalOnly:
        patterns[i] = MakePattern(num_query_blocks, num_key_blocks, 0.0, seed);
        break;
      case Blocks::kNoBits:
        patterns[i].resize(static_cast<size_t>(num_query_blocks * PatternWords(num_key_blocks)));
        break;
      case Blocks::kPacked:
        patterns[i] = MakePackedPattern(num_key_blocks);
        break;
      case Blocks::kFull:
        patterns[i] = MakePattern(num_query_blocks, num_key_blocks, 1.0, seed);
        break;
      default:
        break;
    }
    work[i].head = c.num_heads - 1 - h;  // any order is allowed
    if (!patterns[i].empty()) work[i].pattern = patterns[i].data();
    if (!last_rows[i].empty()) work[i].last_row = last_rows[i].data();
    if (!block_mass[i].empty()) work[i].block_mass = block_mass[i].data();
  }
  params.q = qkv.q.data();
  params.k = qkv.k.data();
  params.v = qkv.v.data();
  params.out = out.data();
  params.num_queries = c.num_queries;
  params.num_keys = c.num_keys;
  params.kv_head_stride = c.num_keys * c.head_dim;
  params.num_heads = c.num_heads;
  params.num_kv_heads = c.num_kv_heads;
  params.head_dim = c.head_dim;
  params.block_tokens = c.block_tokens;
  params.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  params.work = work.data();
  params.num_work = c.num_heads;
}

}  // namespace prefilld::kernels::testing
