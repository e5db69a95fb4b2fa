// Decode attention: one query per head over a paged KV cache, bound by reading K and V once.
//
// The keys are cut into splits, so that all threads work even with few KV heads. Each (KV head,
// split) is one task for all query heads of the group, and the splits are merged at the end by
// their maxima and sums. The cut depends on the number of keys only, so the result does not depend
// on the number of threads.
#include "kernels/cpu/simd_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/paged_attention.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/exp2-inl.h"
#include "kernels/cpu/ops.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

constexpr int kMaxCacheBlock = 128;  // tokens

// The result of one query head over one split: [max, sum, head_dim sums of 2^(score - max) * v].
float* Partial(const PagedAttentionParams& p, int64_t head, int64_t split) {
  return p.scratch + (head * kPagedAttentionMaxSplits + split) * (p.head_dim + 2);
}

HWY_INLINE float Dot(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int n) {
  const F32 d;
  auto sum = hn::Zero(d);
  for (int i = 0; i < n; i += static_cast<int>(hn::Lanes(d))) {
    sum = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// Computes y[i] = y[i] * rescale + sum over t of weights[t] * rows[t][i]. A strip of y stays in
// registers while the rows are read.
HWY_INLINE void AddWeightedRows(float rescale, const float* HWY_RESTRICT weights,
                                const float* HWY_RESTRICT rows, int64_t row_stride, int num_rows,
                                int n, float* HWY_RESTRICT y) {
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    hn::Vec<F32> sum[4];
    for (int j = 0; j < 4; ++j) {
      sum[j] = hn::Mul(hn::LoadU(d, y + i + j * lanes), hn::Set(d, rescale));
    }
    for (int t = 0; t < num_rows; ++t) {
      const float* row = rows + t * row_stride + i;
      for (int j = 0; j < 4; ++j) {
        sum[j] = hn::MulAdd(hn::Set(d, weights[t]), hn::LoadU(d, row + j * lanes), sum[j]);
      }
    }
    for (int j = 0; j < 4; ++j) hn::StoreU(sum[j], d, y + i + j * lanes);
  }
  for (; i < n; i += lanes) {
    auto sum = hn::Mul(hn::LoadU(d, y + i), hn::Set(d, rescale));
    for (int t = 0; t < num_rows; ++t) {
      sum = hn::MulAdd(hn::Set(d, weights[t]), hn::LoadU(d, rows + t * row_stride + i), sum);
    }
    hn::StoreU(sum, d, y + i);
  }
}

// Adds the keys of one cache block (the first `num_tokens`) to the partial result of one head.
void AttendCacheBlock(const PagedAttentionParams& p, const float* q, const float* k, const float* v,
                      int num_tokens, float* partial) {
  const F32 d;
  HWY_ALIGN float weights[kMaxCacheBlock];
  float max = partial[0];
  for (int t = 0; t < num_tokens; ++t) {
    weights[t] = Dot(q, k + t * p.token_stride, p.head_dim) * (p.scale * kLog2E);
    max = std::max(max, weights[t]);
  }
  // The last vector is filled up with minus infinity, whose exponential is zero.
  const int padded = static_cast<int>(hwy::RoundUpTo(num_tokens, hn::Lanes(d)));
  std::fill(weights + num_tokens, weights + padded, -std::numeric_limits<float>::infinity());
  auto sum = hn::Zero(d);
  for (int t = 0; t < padded; t += static_cast<int>(hn::Lanes(d))) {
    const auto weight = Exp2(d, hn::Sub(hn::Load(d, weights + t), hn::Set(d, max)));
    hn::Store(weight, d, weights + t);
    sum = hn::Add(sum, weight);
  }
  const float rescale = std::exp2(partial[0] - max);
  partial[0] = max;
  partial[1] = partial[1] * rescale + hn::GetLane(hn::SumOfLanes(d, sum));
  AddWeightedRows(rescale, weights, v, p.token_stride, num_tokens, p.head_dim, partial + 2);
}

void AttendSplit(const PagedAttentionParams& p, int64_t kv_head, int64_t split, int64_t first_block,
                 int64_t last_block) {
  const int group = p.num_heads / p.num_kv_heads;
  for (int g = 0; g < group; ++g) {
    float* partial = Partial(p, kv_head * group + g, split);
    std::fill_n(partial, p.head_dim + 2, 0.0f);
    partial[0] = -1e30f;
  }
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t offset = p.block_table[block] * p.block_stride + kv_head * p.head_stride;
    const int tokens =
        static_cast<int>(std::min<int64_t>(p.block_tokens, p.num_keys - block * p.block_tokens));
    for (int g = 0; g < group; ++g) {
      const int64_t head = kv_head * group + g;
      AttendCacheBlock(p, static_cast<const float*>(p.q) + head * p.head_dim,
                       static_cast<const float*>(p.k_pool) + offset,
                       static_cast<const float*>(p.v_pool) + offset, tokens,
                       Partial(p, head, split));
    }
  }
}

void MergeSplits(const PagedAttentionParams& p, int64_t head, int64_t num_splits) {
  float max = Partial(p, head, 0)[0];
  for (int64_t s = 1; s < num_splits; ++s) max = std::max(max, Partial(p, head, s)[0]);
  float* out = static_cast<float*>(p.out) + head * p.head_dim;
  std::fill_n(out, p.head_dim, 0.0f);
  float sum = 0.0f;
  for (int64_t s = 0; s < num_splits; ++s) {
    const float* partial = Partial(p, head, s);
    const float weight = std::exp2(partial[0] - max);
    sum += weight * partial[1];
    AddWeightedRows(1.0f, &weight, partial + 2, 0, 1, p.head_dim, out);
  }
  for (int i = 0; i < p.head_dim; ++i) out[i] /= sum;
}

void PagedAttentionSplits(const PagedAttentionParams& p) {
  constexpr int64_t kMinSplitTokens = 256;
  const int64_t num_blocks = CeilDiv(p.num_keys, p.block_tokens);
  const int64_t wanted =
      std::clamp<int64_t>(p.num_keys / kMinSplitTokens, 1, kPagedAttentionMaxSplits);
  const int64_t split_blocks = CeilDiv(num_blocks, wanted);
  const int64_t num_splits = CeilDiv(num_blocks, split_blocks);
#pragma omp parallel for schedule(static) if (num_splits > 1)
  for (int64_t task = 0; task < num_splits * p.num_kv_heads; ++task) {
    const int64_t split = task % num_splits;
    AttendSplit(p, task / num_splits, split, split * split_blocks,
                std::min((split + 1) * split_blocks, num_blocks));
  }
  for (int64_t head = 0; head < p.num_heads; ++head) MergeSplits(p, head, num_splits);
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {

HWY_EXPORT(PagedAttentionSplits);

void PagedAttention(const PagedAttentionParams& params) {
  HWY_DYNAMIC_DISPATCH(PagedAttentionSplits)(params);
}

}  // namespace prefilld::kernels::cpu
#endif
