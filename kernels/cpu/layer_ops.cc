#include "kernels/cpu/simd_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/layer_ops.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/attention.h"
#include "kernels/cpu/exp2-inl.h"
#include "kernels/cpu/ops.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

// The number of tokens per task.
constexpr int64_t kTokensPerTask = 32;
constexpr int kMaxRopeDim = 512;

void NormalizeRow(const float* x, const float* weight, int64_t n, float epsilon, float* y) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, x + i);
    sum = hn::MulAdd(v, v, sum);
  }
  float square_sum = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) square_sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(square_sum / static_cast<float>(n) + epsilon);
  const auto scale = hn::Set(d, factor);
  for (i = 0; i + lanes <= n; i += lanes) {
    const auto v = hn::Mul(hn::LoadU(d, x + i), scale);
    hn::StoreU(hn::Mul(v, hn::LoadU(d, weight + i)), d, y + i);
  }
  for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

void RmsNormTokens(const RmsNormParams& p) {
  const float* x = static_cast<const float*>(p.x);
  float* y = static_cast<float*>(p.y);
#pragma omp parallel for schedule(static) if (p.num_tokens > 1)
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    NormalizeRow(x + t * p.hidden, static_cast<const float*>(p.weight), p.hidden, p.epsilon,
                 y + t * p.hidden);
  }
}

void SwiGluRow(const float* gate, const float* up, int64_t n, float* y) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto g = hn::LoadU(d, gate + i);
    // The limit changes nothing: beyond 2^126 the sigmoid is zero in fp32 anyway.
    const auto power = hn::Min(hn::Mul(g, hn::Set(d, -kLog2E)), hn::Set(d, 126.0f));
    const auto denominator = hn::Add(hn::Set(d, 1.0f), Exp2(d, power));
    hn::StoreU(hn::Mul(hn::Div(g, denominator), hn::LoadU(d, up + i)), d, y + i);
  }
  for (; i < n; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void SwiGluTokens(const SwiGluParams& p) {
#pragma omp parallel for schedule(static) if (p.num_tokens > 1)
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const float* gate = static_cast<const float*>(p.gate_up) + t * 2 * p.intermediate;
    SwiGluRow(gate, gate + p.intermediate, p.intermediate,
              static_cast<float*>(p.y) + t * p.intermediate);
  }
}

// cos and sin of the angles of a task's tokens, [num_tokens, head_dim / 2].
struct Angles {
  float cos[kTokensPerTask * kMaxRopeDim / 2];
  float sin[kTokensPerTask * kMaxRopeDim / 2];
};

// Computes the angles of `num_tokens` consecutive positions. Those of the first are computed
// directly, the others by rotation in double precision, whose error over one task stays far below
// fp32.
void ComputeAngles(const QkvRopeParams& p, int64_t first_position, int64_t num_tokens, Angles& a) {
  const int half = p.head_dim / 2;
  double cos[kMaxRopeDim / 2], sin[kMaxRopeDim / 2], step_cos[kMaxRopeDim / 2],
      step_sin[kMaxRopeDim / 2];
  for (int i = 0; i < half; ++i) {
    const double frequency = p.inv_freq[i];
    const double angle = static_cast<double>(first_position) * frequency;
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
    step_cos[i] = std::cos(frequency);
    step_sin[i] = std::sin(frequency);
  }
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int i = 0; i < half; ++i) {
      a.cos[t * half + i] = static_cast<float>(cos[i] * p.attention_factor);
      a.sin[t * half + i] = static_cast<float>(sin[i] * p.attention_factor);
      const double next = cos[i] * step_cos[i] - sin[i] * step_sin[i];
      sin[i] = sin[i] * step_cos[i] + cos[i] * step_sin[i];
      cos[i] = next;
    }
  }
}

int64_t PositionOf(const QkvRopeParams& p, int64_t token) {
  return p.positions != nullptr ? p.positions[token] : p.first_position + token;
}

// Returns the first token in (begin, end) whose position does not follow that of the token before,
// or `end`.
int64_t EndOfRun(const QkvRopeParams& p, int64_t begin, int64_t end) {
  if (p.positions == nullptr) return end;
  int64_t token = begin + 1;
  while (token < end && p.positions[token] == p.positions[token - 1] + 1) ++token;
  return token;
}

// to = rotation of from by the angles; from may be to.
void RotateHead(const float* from, const float* cos, const float* sin, int half, float* to) {
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= half; i += lanes) {
    const auto a = hn::LoadU(d, from + i);
    const auto b = hn::LoadU(d, from + half + i);
    const auto c = hn::LoadU(d, cos + i);
    const auto s = hn::LoadU(d, sin + i);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, to + i);
    hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, to + half + i);
  }
  for (; i < half; ++i) {
    const float a = from[i], b = from[half + i];
    to[i] = a * cos[i] - b * sin[i];
    to[half + i] = b * cos[i] + a * sin[i];
  }
}

void QkvRopeTokens(const QkvRopeParams& p) {
  const int64_t head_dim = p.head_dim;
  const int64_t row = (p.num_heads + 2 * p.num_kv_heads) * head_dim;
  const float* q_norm = static_cast<const float*>(p.q_norm);
  const float* k_norm = static_cast<const float*>(p.k_norm);
  const int64_t num_tasks = CeilDiv(p.num_tokens, kTokensPerTask);
#pragma omp parallel for schedule(static) if (num_tasks > 1)
  for (int64_t task = 0; task < num_tasks; ++task) {
    Angles angles;
    const int64_t end = std::min((task + 1) * kTokensPerTask, p.num_tokens);
    int64_t begin = task * kTokensPerTask;
    int64_t run_end = begin;  // angles are computed for runs of consecutive positions
    for (int64_t t = begin; t < end; ++t) {
      if (t == run_end) {
        begin = t;
        run_end = EndOfRun(p, begin, end);
        ComputeAngles(p, PositionOf(p, begin), run_end - begin, angles);
      }
      const float* cos = angles.cos + (t - begin) * (head_dim / 2);
      const float* sin = angles.sin + (t - begin) * (head_dim / 2);
      const float* from = static_cast<const float*>(p.qkv) + t * row;
      const auto rotate = [&](const float* norm, float* to) {
        if (norm != nullptr) NormalizeRow(from, norm, head_dim, p.norm_epsilon, to);
        RotateHead(norm != nullptr ? to : from, cos, sin, p.head_dim / 2, to);
        from += head_dim;
      };
      float* q = static_cast<float*>(p.q) + t * p.num_heads * head_dim;
      for (int h = 0; h < p.num_heads; ++h) rotate(q_norm, q + h * head_dim);
      float* k = static_cast<float*>(p.k) + t * p.kv_token_stride;
      for (int h = 0; h < p.num_kv_heads; ++h) rotate(k_norm, k + h * p.kv_head_stride);
      float* v = static_cast<float*>(p.v) + t * p.kv_token_stride;
      for (int h = 0; h < p.num_kv_heads; ++h, from += head_dim) {
        std::copy_n(from, head_dim, v + h * p.kv_head_stride);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {

HWY_EXPORT(RmsNormTokens);
HWY_EXPORT(SwiGluTokens);
HWY_EXPORT(QkvRopeTokens);

void RmsNorm(const RmsNormParams& params) { HWY_DYNAMIC_DISPATCH(RmsNormTokens)(params); }

void SwiGlu(const SwiGluParams& params) { HWY_DYNAMIC_DISPATCH(SwiGluTokens)(params); }

void GatedLinear(const GatedLinearParams& params) {
  Linear({.x = params.x,
          .w = params.w,
          .y = params.gate_up,
          .num_tokens = params.num_tokens,
          .in_features = params.in_features,
          .out_features = 2 * params.intermediate});
  SwiGlu({.gate_up = params.gate_up,
          .y = params.y,
          .num_tokens = params.num_tokens,
          .intermediate = params.intermediate});
}

void QkvRope(const QkvRopeParams& params) { HWY_DYNAMIC_DISPATCH(QkvRopeTokens)(params); }

void Embedding(const EmbeddingParams& params) {
  const float* table = static_cast<const float*>(params.table);
  float* y = static_cast<float*>(params.y);
#pragma omp parallel for schedule(static) if (params.num_tokens > 64)
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    std::copy_n(table + params.ids[t] * params.hidden, params.hidden, y + t * params.hidden);
  }
}

void TokenLogprobs(const TokenLogprobsParams& params) {
#pragma omp parallel for schedule(static) if (params.num_tokens > 1)
  for (int64_t t = 0; t < params.num_tokens; ++t) {
    const float* row = static_cast<const float*>(params.logits) + t * params.vocab_size;
    const float best = *std::max_element(row, row + params.vocab_size);
    double sum = 0.0;
    for (int64_t i = 0; i < params.vocab_size; ++i) sum += std::exp(row[i] - best);
    const auto log_sum = static_cast<float>(std::log(sum));
    params.logprobs[t] = row[params.targets[t]] - best - log_sum;
    params.best_logprobs[t] = -log_sum;
  }
}

}  // namespace prefilld::kernels::cpu
#endif
