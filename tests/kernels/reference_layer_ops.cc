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

// Converts to fp8 e4m3, up to its largest number, 448. NaN and infinities become NaN.
uint8_t ToE4m3(float x) {
  const auto sign = static_cast<uint8_t>(std::signbit(x) ? 0x80 : 0);
  if (!std::isfinite(x)) return sign | 0x7f;
  // A number is 8 to 16 units of its power of two; a unit is never below 2^-9.
  const double abs = std::fabs(static_cast<double>(x));
  const int exponent = std::max(abs > 0.0 ? std::ilogb(abs) : -6, -6);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(abs, 3 - exponent)));
  return static_cast<uint8_t>(sign | (((exponent + 6) << 3) + units));
}

float Source(const PackKvParams& p, const void* tensor, int64_t head, int64_t token, int64_t i) {
  if (token >= p.num_tokens) return 0.0f;
  const int64_t at = (p.first_head + head) * p.kv_head_stride + token * p.head_dim + i;
  if (p.src_dtype == DType::kFp32) return static_cast<const float*>(tensor)[at];
  return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(tensor)[at]} << 16);
}

// Returns the scale of the vector that holds a token.
float ScaleOf(const PackKvParams& p, const void* tensor, int64_t head, int64_t token) {
  const bool per_block = p.scales == KvScales::kPerBlock;
  const int64_t first = per_block ? token / p.block_tokens * p.block_tokens : token;
  const int64_t end = per_block ? first + p.block_tokens : token + 1;
  float largest = 0.0f;
  for (int64_t t = first; t < end; ++t) {
    for (int64_t i = 0; i < p.head_dim; ++i) {
      const float abs = std::fabs(Source(p, tensor, head, t, i));
      if (std::isfinite(abs)) largest = std::max(largest, abs);
    }
  }
  return largest == 0.0f ? 0.0f : std::max(largest / 448.0f, std::ldexp(1.0f, -126));
}

void PackElement(const PackKvParams& p, float x, float scale, int64_t at) {
  if (p.scales != KvScales::kNone) {
    const float scaled = std::isfinite(x) && scale > 0.0f ? x * (1.0f / scale) : x;
    static_cast<uint8_t*>(p.dst)[at] = ToE4m3(scaled);
  } else if (p.dst_dtype == DType::kFp32) {
    static_cast<float*>(p.dst)[at] = x;
  } else {
    static_cast<uint16_t*>(p.dst)[at] = p.dst_dtype == DType::kBf16 ? ToBf16(x) : ToFp16(x);
  }
}

// Calls visit(tensor, head, token) in the order of the wire, where a block has so many tokens, for
// tokens that are `tokens_apart`.
template <typename Visit>
void Walk(const PackKvParams& p, int tokens, int tokens_apart, Visit visit) {
  const bool by_token = p.order == KvOrder::kNhd || p.order == KvOrder::kNh2d;
  const auto walk_block = [&](int64_t block, std::initializer_list<const void*> tensors) {
    for (int64_t a = 0; a < (by_token ? tokens : p.num_heads); ++a) {
      for (int64_t b = 0; b < (by_token ? p.num_heads : tokens); ++b) {
        for (const void* tensor : tensors) {
          visit(tensor, by_token ? b : a,
                block * p.block_tokens + (by_token ? a : b) * tokens_apart);
        }
      }
    }
  };
  const int64_t end = p.first_block + p.num_blocks;
  if (IsInterleaved(p.order)) {
    for (int64_t block = p.first_block; block < end; ++block) walk_block(block, {p.k, p.v});
    return;
  }
  for (const void* tensor : {p.k, p.v}) {
    for (int64_t block = p.first_block; block < end; ++block) walk_block(block, {tensor});
  }
}

}  // namespace

void PackKv(const PackKvParams& p) {
  int64_t at = 0;
  Walk(p, p.block_tokens, 1, [&](const void* tensor, int64_t head, int64_t token) {
    const float scale = p.scales == KvScales::kNone ? 0.0f : ScaleOf(p, tensor, head, token);
    for (int64_t i = 0; i < p.head_dim; ++i, ++at) {
      PackElement(p, Source(p, tensor, head, token, i), scale, at);
    }
  });
  if (p.scales == KvScales::kNone) return;
  // Behind the elements, one byte each, come the scales.
  auto* scale = static_cast<char*>(p.dst) + at;
  const bool per_block = p.scales == KvScales::kPerBlock;
  Walk(p, per_block ? 1 : p.block_tokens, per_block ? p.block_tokens : 1,
       [&](const void* tensor, int64_t head, int64_t token) {
         const float value = ScaleOf(p, tensor, head, token);
         std::memcpy(scale, &value, sizeof(value));
         scale += sizeof(value);
       });
}

}  // namespace prefilld::kernels::reference
