// Prefill attention: one task per (query block, head), each an online softmax over tiles of keys.
//
// Arithmetic for one tile of 64 queries by 64 keys, head_dim d: both products together are
// 2 * 64 * 64 * d multiply-adds. The 64 * 64 exponentials take some 14 vector operations each, so
// at d = 64 they add about a tenth to the multiply-adds' time. The tile reads 512 * d bytes of K
// and V: one byte for 16 multiply-adds, which is one byte a cycle of a core with one 512-bit
// multiply-add. Queries (256 * d bytes), scores (16 KiB) and output (256 * d bytes) stay in the
// first and second level caches. So the multiply-add units bound it. One core of a Zen 4 with
// 512-bit vectors reaches 94 GFLOP/s of a peak of 114 (tests/bench/cpu_attention_bench.cc, dense,
// head_dim 64).
//
// Block mass needs no second pass. For every (row, key block) the sum of the exponentials is kept,
// and the maximum that they refer to. When the row is done, they are brought to the final maximum
// and sum.
#include "kernels/cpu/simd_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include <omp.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "hwy/highway.h"
#include "kernels/cpu/attention_tile-inl.h"
#include "kernels/cpu/ops.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

// The data of one task, which stay in cache.
struct Scratch {
  HWY_ALIGN float queries[kMaxHeadDim * kTile];  // [head_dim, kTile]
  HWY_ALIGN float output[kMaxHeadDim * kTile];   // [head_dim, kTile]
  HWY_ALIGN float scores[kTile * kTile];         // [key, kTile]
  HWY_ALIGN float rescale[kTile];
  SoftmaxState state;
};

// For one key block of a tile of queries: the sum of its exponentials relative to `max`.
struct BlockRecord {
  float max[kTile];
  float sum[kTile];
};

// One tile of queries of one head. They are at the absolute positions [first_position,
// last_position), which lie in the kTile-aligned tile `query_tile`.
struct QueryTile {
  const AttentionParams& params;
  const HeadWork& work;
  int64_t query_tile;
  int64_t first_position;
  int64_t last_position;

  size_t FirstLane() const { return static_cast<size_t>(first_position - query_tile * kTile); }
  size_t LastLane() const { return static_cast<size_t>(last_position - query_tile * kTile); }
  int64_t RowStride() const { return int64_t{params.num_heads} * params.head_dim; }
  // The offset of the first query in q and out.
  int64_t Offset() const {
    const int64_t query = first_position - (params.num_keys - params.num_queries);
    return query * RowStride() + int64_t{work.head} * params.head_dim;
  }
};

// Adds key block `block` to the running softmax and output.
void AttendBlock(const QueryTile& tile, int64_t block, Scratch& s, BlockRecord* record) {
  const AttentionParams& p = tile.params;
  const int64_t kv_head = tile.work.head / (p.num_heads / p.num_kv_heads);
  const float* k = static_cast<const float*>(p.k) + kv_head * p.kv_head_stride;
  const float* v = static_cast<const float*>(p.v) + kv_head * p.kv_head_stride;
  const size_t head_dim = static_cast<size_t>(p.head_dim);
  const int64_t tiles_per_block = p.block_tokens / static_cast<int64_t>(kTile);
  const int64_t first = block * tiles_per_block;
  const int64_t last = std::min(first + tiles_per_block, tile.query_tile + 1);
  float block_sum[kTile] = {};
  for (int64_t key_tile = first; key_tile < last; ++key_tile) {
    const int64_t key = key_tile * static_cast<int64_t>(kTile);
    const size_t num_keys = static_cast<size_t>(std::min<int64_t>(kTile, p.num_keys - key));
    ScoreTile(s.queries, k + key * p.head_dim, num_keys, head_dim, s.scores);
    if (key_tile == tile.query_tile) MaskTile(num_keys, 0, s.scores);
    float sum_before[kTile];
    if (record != nullptr) std::copy_n(s.state.sum, kTile, sum_before);
    SoftmaxTile(num_keys, s.scores, s.state, s.rescale);
    MultiplyTile<true>(head_dim, v + key * p.head_dim, 1, head_dim, s.scores, num_keys, s.rescale,
                       s.output);
    if (record == nullptr) continue;
    for (size_t lane = 0; lane < kTile; ++lane) {
      block_sum[lane] = block_sum[lane] * s.rescale[lane] +
                        (s.state.sum[lane] - sum_before[lane] * s.rescale[lane]);
    }
  }
  if (record == nullptr) return;
  std::copy_n(s.state.max, kTile, record->max);
  std::copy_n(block_sum, kTile, record->sum);
}

// Adds the tile's share of the block mass to mass[num_key_blocks].
void AddBlockMass(const QueryTile& tile, int64_t rows_of_block, const SoftmaxState& state,
                  const BlockRecord* records, int64_t num_records, float* mass) {
  const F32 d;
  HWY_ALIGN float weight[kTile] = {};
  for (size_t lane = tile.FirstLane(); lane < tile.LastLane(); ++lane) {
    weight[lane] = 1.0f / (state.sum[lane] * static_cast<float>(rows_of_block));
  }
  for (int64_t block = 0; block < num_records; ++block) {
    const BlockRecord& record = records[block];
    auto total = hn::Zero(d);
    for (size_t lane = 0; lane < kTile; lane += hn::Lanes(d)) {
      const auto factor =
          Exp2(d, hn::Sub(hn::LoadU(d, record.max + lane), hn::Load(d, state.max + lane)));
      const auto sum = hn::Mul(hn::LoadU(d, record.sum + lane), hn::Load(d, weight + lane));
      total = hn::MulAdd(sum, factor, total);
    }
    mass[block] += hn::GetLane(hn::SumOfLanes(d, total));
  }
}

void StoreOutput(const QueryTile& tile, const Scratch& s) {
  float* out = static_cast<float*>(tile.params.out) + tile.Offset();
  for (size_t lane = tile.FirstLane(); lane < tile.LastLane(); ++lane) {
    const float inverse = 1.0f / s.state.sum[lane];
    for (int i = 0; i < tile.params.head_dim; ++i) out[i] = s.output[i * kTile + lane] * inverse;
    out += tile.RowStride();
  }
}

void AttendTile(const QueryTile& tile, const uint32_t* pattern, const uint32_t* last_row,
                int64_t query_block, int64_t rows_of_block, float* mass, BlockRecord* records) {
  const AttentionParams& p = tile.params;
  Scratch s;
  s.state.Reset();
  std::fill_n(s.output, static_cast<size_t>(p.head_dim) * kTile, 0.0f);
  LoadQueries(static_cast<const float*>(p.q) + tile.Offset(), static_cast<size_t>(tile.RowStride()),
              static_cast<size_t>(p.head_dim), tile.FirstLane(), tile.LastLane(), p.scale * kLog2E,
              s.queries);
  if (pattern == nullptr) {
    for (int64_t block = 0; block <= query_block; ++block) {
      AttendBlock(tile, block, s, mass ? records + block : nullptr);
    }
    if (mass != nullptr) AddBlockMass(tile, rows_of_block, s.state, records, query_block + 1, mass);
  } else {
    for (int64_t word = 0; word <= query_block / 32; ++word) {
      uint32_t bits = pattern[word] | (last_row ? last_row[word] : 0);
      if (word == query_block / 32) bits |= 1u << (query_block % 32);
      for (; bits != 0; bits &= bits - 1) {
        AttendBlock(tile, word * 32 + std::countr_zero(bits), s, nullptr);
      }
    }
  }
  StoreOutput(tile, s);
}

// Computes one query block of one head. `records` has room for one record per key block.
void AttendQueryBlock(const AttentionParams& p, const HeadWork& work, int64_t row,
                      BlockRecord* records) {
  const int64_t first_query = p.num_keys - p.num_queries;
  const int64_t query_block = FirstQueryBlock(p) + row;
  const int64_t begin = std::max(query_block * p.block_tokens, first_query);
  const int64_t end = std::min((query_block + 1) * p.block_tokens, p.num_keys);
  const int64_t row_key_blocks = RowKeyBlocks(p);
  const int64_t words = PatternWords(row_key_blocks);
  const bool is_last = end == p.num_keys;
  float* mass = work.block_mass ? work.block_mass + row * row_key_blocks : nullptr;
  if (mass != nullptr) std::fill_n(mass, row_key_blocks, 0.0f);
  constexpr int64_t kTokens = kTile;
  for (int64_t tile = begin / kTokens; tile * kTokens < end; ++tile) {
    AttendTile(
        {p, work, tile, std::max(begin, tile * kTokens), std::min(end, (tile + 1) * kTokens)},
        work.pattern ? work.pattern + row * words : nullptr, is_last ? work.last_row : nullptr,
        query_block, end - begin, mass, records);
  }
}

void AttentionTasks(const AttentionParams& p) {
  const int64_t num_key_blocks = CeilDiv(p.num_keys, p.block_tokens);
  const int64_t num_rows = NumQueryBlocks(p);
  bool wants_mass = false;
  for (int w = 0; w < p.num_work; ++w) wants_mass |= p.work[w].block_mass != nullptr;
  // This is the only allocation: 512 bytes per key block for each thread, where block mass is asked
  // for.
  std::vector<BlockRecord> records(
      static_cast<size_t>(wants_mass ? num_key_blocks * omp_get_max_threads() : 0));
  // The longest rows come first, so that the last tasks are short.
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < num_rows * p.num_work; ++task) {
    AttendQueryBlock(p, p.work[task % p.num_work], num_rows - 1 - task / p.num_work,
                     wants_mass ? &records[omp_get_thread_num() * num_key_blocks] : nullptr);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {

HWY_EXPORT(AttentionTasks);

void Attention(const AttentionParams& params) { HWY_DYNAMIC_DISPATCH(AttentionTasks)(params); }

}  // namespace prefilld::kernels::cpu
#endif
