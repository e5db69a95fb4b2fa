// Antidiagonal scores: one task per (tile of 64 query folds, head), each an online softmax over
// tiles of key folds, as in attention.cc.
//
// Nothing has to be folded on the side of the keys: `stride` consecutive keys, [stride, head_dim]
// in memory, are one row of the folded matrix [folds, stride * head_dim]. The queries of a tile are
// gathered once, transposed, with the last of a fold first. The sum of the exponentials of every
// (query fold, key block) is kept with the maximum that it refers to, and brought to the final
// maximum when the row is done; scores never leave the tile.
#include "kernels/cpu/simd_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/antidiagonal_scores.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include <omp.h>

#include <algorithm>
#include <new>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "hwy/highway.h"
#include "kernels/cpu/attention_tile-inl.h"
#include "kernels/cpu/ops.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kTileFolds = kTile;

// For one key block of a tile: the sum of each lane's exponentials relative to `max`.
struct MassRecord {
  float max[kTile];
  float sum[kTile];
};

// The memory of one thread.
struct FoldScratch {
  explicit FoldScratch(const AntidiagonalScoresParams& p, int64_t num_key_blocks)
      : queries(hwy::AllocateAligned<float>(p.stride * p.head_dim * kTile)),
        last_fold(static_cast<size_t>(p.stride * p.head_dim)),
        records(static_cast<size_t>(num_key_blocks)) {
    if (queries == nullptr) throw std::bad_alloc();
  }

  hwy::AlignedFreeUniquePtr<float[]> queries;  // [stride * head_dim, kTile]
  std::vector<float> last_fold;                // a partial last key fold, with zeros
  std::vector<MassRecord> records;             // [num_key_blocks]
  HWY_ALIGN float scores[kTile * kTile];       // [key fold, kTile]
  SoftmaxState state;
};

// One tile of query folds of one head: absolute folds [first, first + kTile), some of which may lie
// outside the call.
struct FoldTile {
  const AntidiagonalScoresParams& p;
  const AntidiagonalFolds& folds;
  const float* keys;  // [num_keys, head_dim] of the head's KV head
  int head;
  int64_t first;

  int64_t end() const { return std::min(first + kTileFolds, folds.num_folds); }
};

// Fills queries[t * head_dim + i][lane] with scale * q of position stride - 1 - t of the lane's
// fold, and zeros where the call has no query.
void GatherQueries(const FoldTile& tile, float* queries) {
  const AntidiagonalScoresParams& p = tile.p;
  const int64_t first_position = p.num_keys - p.num_queries;
  const float scale = p.scale * kLog2E / static_cast<float>(p.stride);
  std::fill_n(queries, static_cast<size_t>(p.stride * p.head_dim) * kTile, 0.0f);
  for (int64_t lane = 0; lane < tile.end() - tile.first; ++lane) {
    for (int64_t t = 0; t < p.stride; ++t) {
      const int64_t position = (tile.first + lane) * p.stride + p.stride - 1 - t;
      if (position < first_position || position >= p.num_keys) continue;
      const float* q = static_cast<const float*>(p.q) +
                       ((position - first_position) * p.num_heads + tile.head) * p.head_dim;
      float* column = queries + t * p.head_dim * kTileFolds + lane;
      for (int64_t i = 0; i < p.head_dim; ++i) column[i * kTileFolds] = scale * q[i];
    }
  }
}

// Computes the scores of `count` key folds from `first_fold` on.
void ScoreFolds(const FoldTile& tile, int64_t first_fold, int64_t count, FoldScratch& s) {
  const AntidiagonalScoresParams& p = tile.p;
  const int64_t width = int64_t{p.stride} * p.head_dim;
  const int64_t whole = std::clamp<int64_t>(p.num_keys / p.stride - first_fold, 0, count);
  ScoreTile(s.queries.get(), tile.keys + first_fold * width, static_cast<size_t>(whole),
            static_cast<size_t>(width), s.scores);
  if (whole == count) return;
  std::fill(s.last_fold.begin(), s.last_fold.end(), 0.0f);
  std::copy(tile.keys + (first_fold + whole) * width, tile.keys + p.num_keys * p.head_dim,
            s.last_fold.begin());
  ScoreTile(s.queries.get(), s.last_fold.data(), 1, static_cast<size_t>(width),
            s.scores + whole * kTileFolds);
}

// Hides from each lane the key folds that it does not see.
void HideFolds(const FoldTile& tile, int64_t first_fold, int64_t count, float* scores) {
  for (int64_t lane = 0; lane < kTileFolds; ++lane) {
    const int64_t visible = tile.folds.Visible(tile.first + lane) - first_fold;
    for (int64_t k = std::max<int64_t>(visible, 0); k < count; ++k) {
      scores[k * kTileFolds + lane] = -std::numeric_limits<float>::infinity();
    }
  }
}

// Adds the scores of `count` key folds, which begin with a block, to the running softmax, and
// writes a record for each of their blocks.
void AbsorbFolds(int64_t count, int64_t per_block, float* HWY_RESTRICT scores, SoftmaxState& state,
                 MassRecord* records) {
  const F32 d;
  for (size_t lane = 0; lane < kTile; lane += hn::Lanes(d)) {
    const auto old_max = hn::Load(d, state.max + lane);
    auto max = old_max;
    for (int64_t k = 0; k < count; ++k) {
      max = hn::Max(hn::Load(d, scores + k * kTileFolds + lane), max);
    }
    auto total = hn::Mul(hn::Load(d, state.sum + lane), Exp2(d, hn::Sub(old_max, max)));
    for (int64_t block = 0; block * per_block < count; ++block) {
      auto sum = hn::Zero(d);
      const int64_t end = std::min(count, (block + 1) * per_block);
      for (int64_t k = block * per_block; k < end; ++k) {
        sum = hn::Add(sum, Exp2(d, hn::Sub(hn::Load(d, scores + k * kTileFolds + lane), max)));
      }
      hn::StoreU(max, d, records[block].max + lane);
      hn::StoreU(sum, d, records[block].sum + lane);
      total = hn::Add(total, sum);
    }
    hn::Store(max, d, state.max + lane);
    hn::Store(total, d, state.sum + lane);
  }
}

// Writes the rows of block mass of the tile: `out` is the head's, [num_query_blocks,
// num_key_blocks].
void WriteMass(const FoldTile& tile, const FoldScratch& s, float* out) {
  const F32 d;
  const AntidiagonalFolds& folds = tile.folds;
  HWY_ALIGN float weight[kTile] = {};
  for (int64_t lane = std::max<int64_t>(0, folds.first_query_fold - tile.first);
       lane < tile.end() - tile.first; ++lane) {
    weight[lane] = 1.0f / s.state.sum[lane];
  }
  const int64_t first_row = tile.first / folds.per_block;
  const int64_t last_row = (tile.end() - 1) / folds.per_block;
  for (int64_t block = 0; block <= last_row; ++block) {
    const MassRecord& record = s.records[block];
    HWY_ALIGN float mass[kTile];
    for (size_t lane = 0; lane < kTile; lane += hn::Lanes(d)) {
      const auto factor =
          Exp2(d, hn::Sub(hn::LoadU(d, record.max + lane), hn::Load(d, s.state.max + lane)));
      const auto sum = hn::Mul(hn::LoadU(d, record.sum + lane), hn::Load(d, weight + lane));
      hn::Store(hn::Mul(sum, factor), d, mass + lane);
    }
    for (int64_t row = std::max({first_row, block, folds.first_query_block}); row <= last_row;
         ++row) {
      const int64_t first = std::max(row * folds.per_block, folds.first_query_fold);
      const int64_t end = std::min((row + 1) * folds.per_block, folds.num_folds);
      float total = 0.0f;
      for (int64_t fold = first; fold < end; ++fold) total += mass[fold - tile.first];
      out[(row - folds.first_query_block) * folds.num_key_blocks + block] =
          total / static_cast<float>(end - first);
    }
  }
}

void ScoreTileOfFolds(const FoldTile& tile, FoldScratch& s, float* out) {
  GatherQueries(tile, s.queries.get());
  s.state.Reset();
  for (int64_t fold = 0; fold < tile.end(); fold += kTileFolds) {
    const int64_t count = std::min(kTileFolds, tile.end() - fold);
    ScoreFolds(tile, fold, count, s);
    if (fold == tile.first) HideFolds(tile, fold, count, s.scores);
    AbsorbFolds(count, tile.folds.per_block, s.scores, s.state,
                &s.records[static_cast<size_t>(fold / tile.folds.per_block)]);
  }
  WriteMass(tile, s, out);
}

void AntidiagonalTasks(const AntidiagonalScoresParams& p) {
  const AntidiagonalFolds folds(p);
  const int64_t first_tile = folds.first_query_fold / kTileFolds;
  const int64_t num_tiles = CeilDiv(folds.num_folds, kTileFolds) - first_tile;
  const int64_t num_tasks = num_tiles * p.num_scored;
  // This is the only allocation: for each thread stride * head_dim * 256 bytes of queries and 512
  // bytes a key block.
  std::vector<FoldScratch> scratch;
  const auto num_threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), num_tasks));
  for (int i = 0; i < num_threads; ++i) scratch.emplace_back(p, folds.num_key_blocks);
    // The longest rows come first, so that the last tasks are short.
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t place = task % p.num_scored;
    const int head = p.heads[place];
    const float* keys =
        static_cast<const float*>(p.k) + head / (p.num_heads / p.num_kv_heads) * p.kv_head_stride;
    const int64_t tile = first_tile + num_tiles - 1 - task / p.num_scored;
    ScoreTileOfFolds({p, folds, keys, head, tile * kTileFolds}, scratch[omp_get_thread_num()],
                     p.block_mass + place * folds.num_query_blocks * folds.num_key_blocks);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {

HWY_EXPORT(AntidiagonalTasks);

void AntidiagonalScores(const AntidiagonalScoresParams& params) {
  HWY_DYNAMIC_DISPATCH(AntidiagonalTasks)(params);
}

}  // namespace prefilld::kernels::cpu
#endif
