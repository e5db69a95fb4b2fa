#include "tests/kernels/reference_layer_ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace prefilld::kernels::reference {
namespace {

const float* In(const void* tensor) { return static_cast<const float*>(tensor); }
float* Out(void* tensor) { return static_cast<float*>(tensor); }

void Normalize(const float* x, const float* weight, int64_t n, double epsilon, double* y) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  const double factor = 1.0 / std::sqrt(sum / static_cast<double>(n) + epsilon);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

}  // namespace

void Embedding(const EmbeddingParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t i = 0; i < p.hidden; ++i) {
      Out(p.y)[t * p.hidden + i] = In(p.table)[p.ids[t] * p.hidden + i];
    }
  }
}

void RmsNorm(const RmsNormParams& p) {
  std::vector<double> y(static_cast<size_t>(p.hidden));
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    Normalize(In(p.x) + t * p.hidden, In(p.weight), p.hidden, p.epsilon, y.data());
    std::copy(y.begin(), y.end(), Out(p.y) + t * p.hidden);
  }
}

void Linear(const LinearParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t o = 0; o < p.out_features; ++o) {
      float* y = Out(p.y) + t * p.out_features + o;
      double sum = p.accumulate ? *y : 0.0;
      if (p.bias != nullptr) sum += In(p.bias)[o];
      for (int64_t i = 0; i < p.in_features; ++i) {
        sum += static_cast<double>(In(p.x)[t * p.in_features + i]) * In(p.w)[o * p.in_features + i];
      }
      *y = static_cast<float>(sum);
    }
  }
}

void QkvRope(const QkvRopeParams& p) {
  const int64_t head_dim = p.head_dim;
  const int64_t half = head_dim / 2;
  std::vector<double> head(static_cast<size_t>(head_dim));
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const auto position =
        static_cast<double>(p.positions != nullptr ? p.positions[t] : p.first_position + t);
    for (int64_t h = 0; h < p.num_heads + 2 * p.num_kv_heads; ++h) {
      const float* from = In(p.qkv) + (t * (p.num_heads + 2 * p.num_kv_heads) + h) * head_dim;
      const int64_t kv = (h - p.num_heads) % p.num_kv_heads;
      const int64_t kv_offset = kv * p.kv_head_stride + t * p.kv_token_stride;
      if (h >= p.num_heads + p.num_kv_heads) {
        std::copy_n(from, head_dim, Out(p.v) + kv_offset);
        continue;
      }
      const bool is_query = h < p.num_heads;
      const void* norm = is_query ? p.q_norm : p.k_norm;
      if (norm != nullptr) {
        Normalize(from, In(norm), head_dim, p.norm_epsilon, head.data());
      } else {
        std::copy_n(from, head_dim, head.begin());
      }
      float* to = is_query ? Out(p.q) + (t * p.num_heads + h) * head_dim : Out(p.k) + kv_offset;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = position * static_cast<double>(p.inv_freq[i]);
        const double cos = p.attention_factor * std::cos(angle);
        const double sin = p.attention_factor * std::sin(angle);
        const double a = head[static_cast<size_t>(i)], b = head[static_cast<size_t>(half + i)];
        to[i] = static_cast<float>(a * cos - b * sin);
        to[half + i] = static_cast<float>(b * cos + a * sin);
      }
    }
  }
}

void SwiGlu(const SwiGluParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t i = 0; i < p.intermediate; ++i) {
      const double gate = In(p.gate_up)[t * 2 * p.intermediate + i];
      const double up = In(p.gate_up)[t * 2 * p.intermediate + p.intermediate + i];
      Out(p.y)[t * p.intermediate + i] = static_cast<float>(gate / (1.0 + std::exp(-gate)) * up);
    }
  }
}

void GatedLinear(const GatedLinearParams& p) {
  const auto dot = [&](int64_t token, int64_t row) {
    double sum = 0.0;
    for (int64_t i = 0; i < p.in_features; ++i) {
      sum += static_cast<double>(In(p.x)[token * p.in_features + i]) *
             In(p.w)[row * p.in_features + i];
    }
    return sum;
  };
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t i = 0; i < p.intermediate; ++i) {
      const double gate = dot(t, i);
      const double up = dot(t, p.intermediate + i);
      Out(p.y)[t * p.intermediate + i] = static_cast<float>(gate / (1.0 + std::exp(-gate)) * up);
    }
  }
}

void TokenLogprobs(const TokenLogprobsParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const float* row = static_cast<const float*>(p.logits) + t * p.vocab_size;
    long double sum = 0.0L;
    for (int64_t i = 0; i < p.vocab_size; ++i) sum += std::exp(static_cast<long double>(row[i]));
    const long double log_sum = std::log(sum);
    p.logprobs[t] = static_cast<float>(row[p.targets[t]] - log_sum);
    p.best_logprobs[t] = static_cast<float>(*std::max_element(row, row + p.vocab_size) - log_sum);
  }
}

uint16_t ToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t ToFp16(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return sign | 0x7e00;
  const double abs = std::fabs(static_cast<double>(x));
  if (abs >= 65520.0) return sign | 0x7c00;
  // The value is counted in units of the last place of its binade, 2^-24 at the least. nearbyint
  // rounds to even.
  const int exponent = std::max(abs > 0.0 ? std::ilogb(abs) : -14, -14);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(abs, 10 - exponent)));
  // A normal number has 1024 to 2048 units. If they are rounded up to 2048, the carry increments
  // the exponent.
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

namespace {

// Walks the destination in its order. `tensors` are those of one block: K and then V where a block
// holds both, or one of them.
void PackBlock(const PackKvParams& p, int64_t block, std::initializer_list<const void*> tensors,
               int64_t& at) {
  const bool by_token = p.order == KvOrder::kNhd || p.order == KvOrder::kNh2d;
  const int64_t outer = by_token ? p.block_tokens : p.num_heads;
  const int64_t inner = by_token ? p.num_heads : p.block_tokens;
  for (int64_t a = 0; a < outer; ++a) {
    for (int64_t b = 0; b < inner; ++b) {
      const int64_t token = block * p.block_tokens + (by_token ? a : b);
      const int64_t head = p.first_head + (by_token ? b : a);
      for (const void* tensor : tensors) {
        for (int64_t i = 0; i < p.head_dim; ++i, ++at) {
          const float x = token < p.num_tokens
                              ? In(tensor)[head * p.kv_head_stride + token * p.head_dim + i]
                              : 0.0f;
          if (p.dst_dtype == DType::kFp32) {
            static_cast<float*>(p.dst)[at] = x;
          } else {
            static_cast<uint16_t*>(p.dst)[at] = p.dst_dtype == DType::kBf16 ? ToBf16(x) : ToFp16(x);
          }
        }
      }
    }
  }
}

}  // namespace

void PackKv(const PackKvParams& p) {
  int64_t at = 0;
  const int64_t end = p.first_block + p.num_blocks;
  if (p.order == KvOrder::kNh2d || p.order == KvOrder::kHn2d) {
    for (int64_t block = p.first_block; block < end; ++block) PackBlock(p, block, {p.k, p.v}, at);
    return;
  }
  for (const void* tensor : {p.k, p.v}) {
    for (int64_t block = p.first_block; block < end; ++block) PackBlock(p, block, {tensor}, at);
  }
}

}  // namespace prefilld::kernels::reference
