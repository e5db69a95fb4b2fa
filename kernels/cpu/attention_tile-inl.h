// The register-tiled matrix products of attention, compiled once per instruction set.
//
// Queries lie along the vector lanes: a tile of kTile queries is held transposed, [head_dim,
// kTile], and so are its scores, [key, kTile]. So K and V are read in their natural layout, with
// one scalar broadcast per multiply-add vector, and each lane has its own softmax over keys.
#if defined(PREFILLD_KERNELS_CPU_ATTENTION_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PREFILLD_KERNELS_CPU_ATTENTION_TILE_INL_H_
#undef PREFILLD_KERNELS_CPU_ATTENTION_TILE_INL_H_
#else
#define PREFILLD_KERNELS_CPU_ATTENTION_TILE_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/exp2-inl.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;

// Queries and keys per tile.
inline constexpr size_t kTile = 64;

// A register tile is kRows broadcasts by kVectors vectors: enough independent multiply-adds to
// cover their latency, few enough to stay in the registers.
inline constexpr size_t kRows = 4;
inline constexpr size_t kVectors = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 4 : 2;
inline constexpr size_t kColumns = kVectors * hn::MaxLanes(F32());
static_assert(kTile % kColumns == 0, "a tile is cut into whole register tiles");

// c[i][j] = factor[j] * c[i][j] + sum over k of a(i, k) * b[k][j], for i < kRowCount and
// j < kColumns, where a(i, k) = a[i * a_row + k * a_depth] and rows of b and c are kTile long.
// Without kAccumulate the old c is not read, nor is factor.
template <size_t kRowCount, bool kAccumulate>
HWY_INLINE void MultiplyRegisterTile(const float* HWY_RESTRICT a, size_t a_row, size_t a_depth,
                                     const float* HWY_RESTRICT b, size_t depth, const float* factor,
                                     float* HWY_RESTRICT c) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  hn::Vec<F32> sum[kRowCount][kVectors];
  for (size_t i = 0; i < kRowCount; ++i) {
    for (size_t j = 0; j < kVectors; ++j) {
      sum[i][j] = kAccumulate ? hn::Mul(hn::Load(d, c + i * kTile + j * lanes),
                                        hn::Load(d, factor + j * lanes))
                              : hn::Zero(d);
    }
  }
  for (size_t k = 0; k < depth; ++k) {
    hn::Vec<F32> right[kVectors];
    for (size_t j = 0; j < kVectors; ++j) right[j] = hn::Load(d, b + k * kTile + j * lanes);
    for (size_t i = 0; i < kRowCount; ++i) {
      const auto left = hn::Set(d, a[i * a_row + k * a_depth]);
      for (size_t j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(left, right[j], sum[i][j]);
    }
  }
  for (size_t i = 0; i < kRowCount; ++i) {
    for (size_t j = 0; j < kVectors; ++j) hn::Store(sum[i][j], d, c + i * kTile + j * lanes);
  }
}

template <bool kAccumulate>
HWY_INLINE void MultiplyTile(size_t rows, const float* HWY_RESTRICT a, size_t a_row, size_t a_depth,
                             const float* HWY_RESTRICT b, size_t depth, const float* factor,
                             float* HWY_RESTRICT c) {
  for (size_t j = 0; j < kTile; j += kColumns) {
    size_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      MultiplyRegisterTile<kRows, kAccumulate>(a + i * a_row, a_row, a_depth, b + j, depth,
                                               factor + j, c + i * kTile + j);
    }
    for (; i < rows; ++i) {
      MultiplyRegisterTile<1, kAccumulate>(a + i * a_row, a_row, a_depth, b + j, depth, factor + j,
                                           c + i * kTile + j);
    }
  }
}

// q_t[i][lane] = scale * queries[lane - first_lane][i], rows of queries being row_stride apart;
// lanes outside [first_lane, last_lane) are zero.
HWY_INLINE void LoadQueries(const float* queries, size_t row_stride, size_t head_dim,
                            size_t first_lane, size_t last_lane, float scale, float* q_t) {
  for (size_t i = 0; i < head_dim * kTile; ++i) q_t[i] = 0.0f;
  for (size_t lane = first_lane; lane < last_lane; ++lane) {
    const float* query = queries + (lane - first_lane) * row_stride;
    for (size_t i = 0; i < head_dim; ++i) q_t[i * kTile + lane] = scale * query[i];
  }
}

// scores[key][lane] of num_keys <= kTile keys, [num_keys, head_dim].
HWY_INLINE void ScoreTile(const float* q_t, const float* keys, size_t num_keys, size_t head_dim,
                          float* scores) {
  MultiplyTile<false>(num_keys, keys, head_dim, 1, q_t, head_dim, q_t, scores);
}

// Hides the keys that come after a query: key k from lane l where k > l + offset.
HWY_INLINE void MaskTile(size_t num_keys, int64_t offset, float* scores) {
  for (size_t k = 0; k < num_keys; ++k) {
    for (size_t lane = 0; lane < kTile; ++lane) {
      if (static_cast<int64_t>(k) > static_cast<int64_t>(lane) + offset) {
        scores[k * kTile + lane] = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

// The running softmax of a tile of queries, in base 2. The maximum starts finite so that the
// difference to a hidden score, minus infinity, is well defined.
struct SoftmaxState {
  HWY_ALIGN float max[kTile];
  HWY_ALIGN float sum[kTile];

  void Reset() {
    for (size_t lane = 0; lane < kTile; ++lane) {
      max[lane] = -1e30f;
      sum[lane] = 0.0f;
    }
  }
};

// Turns scores into 2^(score - running maximum) and adds them to the state; rescale[lane] is the
// factor of what was accumulated under the old maximum.
HWY_INLINE void SoftmaxTile(size_t num_keys, float* HWY_RESTRICT scores, SoftmaxState& state,
                            float* HWY_RESTRICT rescale) {
  const F32 d;
  for (size_t lane = 0; lane < kTile; lane += hn::Lanes(d)) {
    const auto old_max = hn::Load(d, state.max + lane);
    auto max = old_max;
    for (size_t k = 0; k < num_keys; ++k) {
      max = hn::Max(hn::Load(d, scores + k * kTile + lane), max);
    }
    auto sum = hn::Zero(d);
    for (size_t k = 0; k < num_keys; ++k) {
      const auto p = Exp2(d, hn::Sub(hn::Load(d, scores + k * kTile + lane), max));
      hn::Store(p, d, scores + k * kTile + lane);
      sum = hn::Add(sum, p);
    }
    const auto factor = Exp2(d, hn::Sub(old_max, max));
    hn::Store(factor, d, rescale + lane);
    hn::Store(max, d, state.max + lane);
    hn::Store(hn::MulAdd(hn::Load(d, state.sum + lane), factor, sum), d, state.sum + lane);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // PREFILLD_KERNELS_CPU_ATTENTION_TILE_INL_H_
