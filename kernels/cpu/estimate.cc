// The estimate: two passes over the keys for the last block of queries, one task per head.
//
// The first pass finds each row's maximum and sum. The second computes the probabilities anew and
// adds them up along columns and diagonals. Computing the scores twice costs 2 * 128 * num_keys *
// head_dim multiply-adds a head, less than one in a hundred of dense attention from 16k tokens on,
// and needs no memory beyond the outputs.
#include "kernels/cpu/simd_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/estimate.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include <algorithm>

#include "hwy/highway.h"
#include "kernels/cpu/attention_tile-inl.h"
#include "kernels/cpu/ops.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kTileTokens = kTile;

// Rows [first_row, first_row + num_rows) of the estimate of one head, at most a tile of them.
struct EstimateTile {
  const EstimateParams& params;
  const float* keys;  // [num_keys, head_dim]
  int64_t first_row;
  int64_t num_rows;

  int64_t FirstPosition() const { return params.num_keys - params.num_queries + first_row; }
  int64_t NumVisibleKeys() const { return FirstPosition() + num_rows; }
};

// Computes the scores of the key tile at `key`, and masks hidden keys. Returns the number of keys.
size_t Scores(const EstimateTile& tile, const float* queries, int64_t key, float* scores) {
  const size_t num_keys = static_cast<size_t>(std::min(kTileTokens, tile.NumVisibleKeys() - key));
  const int64_t head_dim = tile.params.head_dim;
  ScoreTile(queries, tile.keys + key * head_dim, num_keys, static_cast<size_t>(head_dim), scores);
  if (key + kTileTokens > tile.FirstPosition()) {
    MaskTile(num_keys, tile.FirstPosition() - key, scores);
  }
  return num_keys;
}

// Adds the probabilities of key `key` to its column and to the diagonals it lies on.
void AddProbabilities(const EstimateTile& tile, int64_t key, const float* p, float* vertical,
                      float* slash) {
  const F32 d;
  auto sum = hn::Zero(d);
  for (size_t lane = 0; lane < kTile; lane += hn::Lanes(d)) {
    sum = hn::Add(sum, hn::Load(d, p + lane));
  }
  vertical[key] += hn::GetLane(hn::SumOfLanes(d, sum));
  // Lane l is at position FirstPosition() + l; hidden keys would have a negative offset.
  const int64_t offset = tile.FirstPosition() - key;
  for (int64_t lane = std::max<int64_t>(0, -offset); lane < tile.num_rows; ++lane) {
    slash[offset + lane] += p[lane];
  }
}

void EstimateRows(const EstimateTile& tile, int head, float* vertical, float* slash) {
  const EstimateParams& p = tile.params;
  const F32 d;
  HWY_ALIGN float queries[kMaxHeadDim * kTile];
  HWY_ALIGN float scores[kTile * kTile];
  HWY_ALIGN float rescale[kTile];
  SoftmaxState state;
  state.Reset();
  const int64_t row_stride = int64_t{p.num_heads} * p.head_dim;
  LoadQueries(static_cast<const float*>(p.q) + tile.first_row * row_stride + head * p.head_dim,
              static_cast<size_t>(row_stride), static_cast<size_t>(p.head_dim), 0,
              static_cast<size_t>(tile.num_rows), p.scale * kLog2E, queries);
  for (int64_t key = 0; key < tile.NumVisibleKeys(); key += kTileTokens) {
    SoftmaxTile(Scores(tile, queries, key, scores), scores, state, rescale);
  }
  // The weight turns exponentials into a row's share of the mean over all rows. Rows beyond the
  // last have weight 0.
  HWY_ALIGN float weight[kTile] = {};
  for (int64_t lane = 0; lane < tile.num_rows; ++lane) {
    weight[lane] = 1.0f / (state.sum[lane] * static_cast<float>(p.num_queries));
  }
  for (int64_t key = 0; key < tile.NumVisibleKeys(); key += kTileTokens) {
    const size_t num_keys = Scores(tile, queries, key, scores);
    for (size_t k = 0; k < num_keys; ++k) {
      float* row = scores + k * kTile;
      for (size_t lane = 0; lane < kTile; lane += hn::Lanes(d)) {
        const auto x = hn::Sub(hn::Load(d, row + lane), hn::Load(d, state.max + lane));
        hn::Store(hn::Mul(Exp2(d, x), hn::Load(d, weight + lane)), d, row + lane);
      }
      AddProbabilities(tile, key + static_cast<int64_t>(k), row, vertical, slash);
    }
  }
}

void EstimateHeads(const EstimateParams& p) {
  const int64_t num_blocks = CeilDiv(p.num_keys, p.block_tokens);
#pragma omp parallel for schedule(dynamic, 1)
  for (int head = 0; head < p.num_heads; ++head) {
    const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
    const float* keys = static_cast<const float*>(p.k) + kv_head * p.kv_head_stride;
    float* vertical = p.vertical + head * p.num_keys;
    float* slash = p.slash + head * p.num_keys;
    std::fill_n(vertical, p.num_keys, 0.0f);
    std::fill_n(slash, p.num_keys, 0.0f);
    for (int64_t row = 0; row < p.num_queries; row += kTileTokens) {
      EstimateRows({p, keys, row, std::min(kTileTokens, p.num_queries - row)}, head, vertical,
                   slash);
    }
    float* block_mass = p.block_mass + head * num_blocks;
    std::fill_n(block_mass, num_blocks, 0.0f);
    for (int64_t key = 0; key < p.num_keys; ++key)
      block_mass[key / p.block_tokens] += vertical[key];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {

HWY_EXPORT(EstimateHeads);

void Estimate(const EstimateParams& params) { HWY_DYNAMIC_DISPATCH(EstimateHeads)(params); }

}  // namespace prefilld::kernels::cpu
#endif
