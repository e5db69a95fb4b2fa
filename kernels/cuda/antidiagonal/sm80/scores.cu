// The portable antidiagonal scores.
//
// A CTA of four warps takes 64 query folds of one head and walks over their key folds in tiles of
// 64, from the first on. Nothing is folded in memory: the product of two folds is the sum of
// `stride` products of 64 queries and 64 keys that lie `stride` positions apart. Such a pair of
// tiles takes 16 KiB each at head_dim 128 for 1 MFLOP, 32 FLOP a byte, so that L2 bounds it; the
// next pair is on its way meanwhile. The sums over blocks go to scratch memory, and become block
// mass when the row of tiles is done (antidiagonal/mass.cuh).
#include "kernels/cuda/antidiagonal/sm80/scores.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "kernels/cuda/antidiagonal/mass.cuh"
#include "kernels/cuda/attention/sm80/tile.cuh"
#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/shared_address.cuh"
#include "kernels/cuda/launch.cuh"

namespace prefilld::kernels::cuda::sm80 {
namespace {

constexpr int kTile = kGroupFolds;  // query folds of a CTA, and key folds of a step
constexpr int kThreads = 128;
constexpr int kColumnTiles = kTile / 8;

struct KernelParams {
  FoldLaunch launch;
  const __nv_bfloat16* q;  // [num_queries, num_heads, head_dim]
  const __nv_bfloat16* k;  // [num_kv_heads, num_keys, head_dim], kv_head_stride apart
  int64_t num_queries;
  int64_t num_keys;
  int64_t kv_head_stride;
  int num_heads;
};

template <int kHeadDim>
struct alignas(128) SharedMemory {
  __nv_bfloat16 q[2][kTile * kHeadDim];
  __nv_bfloat16 k[2][kTile * kHeadDim];
  float log_sums[kTile];
};

// The number of folds, counted from `first` on, whose token `place` of the fold is before `end`.
__device__ __forceinline__ int folds_before(int64_t end, int first, int place, int stride) {
  const int64_t tokens = end - (static_cast<int64_t>(first) * stride + place);
  return tokens <= 0 ? 0 : static_cast<int>(min((tokens + stride - 1) / stride, int64_t{kTile}));
}

// Starts the copies of one step: position stride - 1 - t of 64 query folds, and position t of 64
// key folds. Positions that the call does not have become zero.
template <int kHeadDim>
__device__ __forceinline__ void load_step(const KernelParams& p, SharedMemory<kHeadDim>& shared,
                                          int buffer, int head, int query_fold, int key_fold,
                                          int t) {
  const FoldLaunch& launch = p.launch;
  const int place = launch.stride - 1 - t;
  const int64_t first_position = p.num_keys - p.num_queries;
  const int64_t row_stride = static_cast<int64_t>(p.num_heads) * kHeadDim;
  const int64_t query = static_cast<int64_t>(query_fold) * launch.stride + place - first_position;
  load_tile_async<kTile, kHeadDim, kThreads>(
      device::shared_address(shared.q[buffer]),
      p.q + query * row_stride + static_cast<int64_t>(head) * kHeadDim, launch.stride * row_stride,
      folds_before(first_position, query_fold, place, launch.stride),
      folds_before(p.num_keys, query_fold, place, launch.stride));
  const int64_t key = static_cast<int64_t>(key_fold) * launch.stride + t;
  load_tile_async<kTile, kHeadDim, kThreads>(
      device::shared_address(shared.k[buffer]),
      p.k + head / launch.heads_per_kv_head * p.kv_head_stride + key * kHeadDim,
      static_cast<int64_t>(launch.stride) * kHeadDim, 0,
      folds_before(p.num_keys, key_fold, t, launch.stride));
  device::commit_async_copies();
}

// The running maxima, scaled to powers of two, and sums of a thread's two folds: those of its
// accumulators' rows.
struct FoldSums {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // this thread's columns only, until reduced

  // Takes in the scores of a tile and turns them into exp2(score * scale_log2 - max).
  __device__ __forceinline__ void update(float (&s)[1][kColumnTiles][4], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = -INFINITY;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        m = fmaxf(m, fmaxf(s[0][j][2 * h], s[0][j][2 * h + 1]));
      }
      const float new_max = fmaxf(max[h], device::quad_max(m) * scale_log2);
      float total = sum[h] * device::exp2_approx(max[h] - new_max);
      max[h] = new_max;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          s[0][j][e] = device::exp2_approx(fmaf(s[0][j][e], scale_log2, -new_max));
          total += s[0][j][e];
        }
      }
      sum[h] = total;
    }
  }
};

// Writes the weights of the tile's blocks: `weights` points to the first block's, for this thread's
// first fold.
template <int kPerBlock>
__device__ __forceinline__ void record(const float (&s)[1][kColumnTiles][4], const FoldSums& sums,
                                       float* weights) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float block = 0.0f;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      block += s[0][j][2 * h] + s[0][j][2 * h + 1];
      if (kPerBlock == 16 && j % 2 == 0) continue;  // the block has another eight columns
      float* out = weights + 8 * h;
      if constexpr (kPerBlock == 4) {
        // Lanes 0 and 1 of a quad hold one block, lanes 2 and 3 the next.
        block += __shfl_xor_sync(0xffffffffu, block, 1);
        out += (2 * j + lane % 4 / 2) * kGroupFolds;
        if (lane % 2 == 0) __stcs(out, sums.max[h] + device::log2_approx(block));
      } else {
        block = device::quad_sum(block);
        out += j * 8 / kPerBlock * kGroupFolds;
        if (lane % 4 == 0) __stcs(out, sums.max[h] + device::log2_approx(block));
      }
      block = 0.0f;
    }
  }
}

// Hides the key folds that a query fold does not see.
__device__ __forceinline__ void mask(const FoldLaunch& launch, float (&s)[1][kColumnTiles][4],
                                     int query_fold, int key_fold) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int visible = VisibleFolds(launch, query_fold + 8 * h) - key_fold;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + device::accumulator_column(lane) + e >= visible) s[0][j][2 * h + e] = -INFINITY;
      }
    }
  }
}

template <int kHeadDim, int kPerBlock>
__device__ __forceinline__ void compute_tile(const KernelParams& p, SharedMemory<kHeadDim>& shared,
                                             int tile, int place) {
  const FoldLaunch& launch = p.launch;
  const int thread = static_cast<int>(threadIdx.x);
  const int head = launch.heads[place];
  const int first_fold = tile * kTile;
  const int first_row = thread / 32 * 16;
  const int own_row = first_row + device::accumulator_row(thread);
  float* weights =
      launch.weights + static_cast<int64_t>(blockIdx.x) * launch.weight_blocks * kGroupFolds;

  FoldSums sums;
  float s[1][kColumnTiles][4];
  clear(s);
  const int num_steps = (tile + 1) * launch.stride;
  int t = 0, key_fold = 0;  // of the step that is computed
  load_step<kHeadDim>(p, shared, 0, head, first_fold, 0, 0);
  for (int step = 0; step < num_steps; ++step) {
    device::wait_async_copies<0>();
    __syncthreads();  // the step's tiles are there, and all warps are done with those before
    const bool ends = t + 1 == launch.stride;
    if (step + 1 < num_steps) {
      load_step<kHeadDim>(p, shared, (step + 1) % 2, head, first_fold,
                          ends ? key_fold + kTile : key_fold, ends ? 0 : t + 1);
    }
    accumulate_qk<kHeadDim, 1, kTile>(s, device::shared_address(shared.q[step % 2]), first_row,
                                      device::shared_address(shared.k[step % 2]));
    ++t;
    if (!ends) continue;
    if (key_fold == first_fold) mask(launch, s, first_fold + own_row, key_fold);
    sums.update(s, launch.scale_log2);
    record<kPerBlock>(s, sums,
                      weights + static_cast<int64_t>(key_fold / kPerBlock) * kGroupFolds + own_row);
    clear(s);
    t = 0;
    key_fold += kTile;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float log_sum = sums.max[h] + device::log2_approx(device::quad_sum(sums.sum[h]));
    const int row = own_row + 8 * h;
    if (thread % 4 == 0) {
      shared.log_sums[row] = has_query(launch, first_fold + row) ? log_sum : INFINITY;
    }
  }
  __syncthreads();  // the weights and log-sums of all warps are written
  write_mass<kPerBlock>(launch, weights, shared.log_sums, first_fold,
                        launch.block_mass + static_cast<int64_t>(place) * launch.num_query_blocks *
                                                launch.num_key_blocks,
                        thread);
}

template <int kHeadDim, int kPerBlock>
__global__ void __launch_bounds__(kThreads)
    antidiagonal_scores_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<SharedMemory<kHeadDim>*>(shared_bytes);
  const FoldLaunch& launch = params.launch;
  const int num_workers = static_cast<int>(gridDim.x);
  for (int turn = 0; turn * num_workers < launch.num_items; ++turn) {
    const int item = ItemOfTurn(turn, static_cast<int>(blockIdx.x), num_workers);
    if (item >= launch.num_items) continue;
    const int num_tiles = launch.num_items / launch.num_scored;
    compute_tile<kHeadDim, kPerBlock>(params, shared,
                                      launch.first_tile + num_tiles - 1 - item / launch.num_scored,
                                      item % launch.num_scored);
    __syncthreads();  // shared memory and weights are free for the next tile
  }
}

template <int kHeadDim, int kPerBlock>
cudaError_t Launch(const KernelParams& params, int num_sms, cudaStream_t stream) {
  const int grid = std::min(kGroupsPerSm * num_sms, params.launch.num_items);
  return LaunchKernel(antidiagonal_scores_kernel<kHeadDim, kPerBlock>, grid, kThreads,
                      sizeof(SharedMemory<kHeadDim>), stream, params);
}

template <int kHeadDim>
cudaError_t LaunchHeadDim(const KernelParams& params, int per_block, int num_sms,
                          cudaStream_t stream) {
  switch (per_block) {
    case 4:
      return Launch<kHeadDim, 4>(params, num_sms, stream);
    case 8:
      return Launch<kHeadDim, 8>(params, num_sms, stream);
    default:
      return Launch<kHeadDim, 16>(params, num_sms, stream);
  }
}

}  // namespace

cudaError_t LaunchAntidiagonalScores(const AntidiagonalScoresParams& p, FoldLaunch launch,
                                     int num_sms, cudaStream_t stream) {
  launch.first_tile = launch.first_query_fold / kTile;
  launch.num_items =
      (static_cast<int>(CeilDiv(launch.num_folds, kTile)) - launch.first_tile) * launch.num_scored;
  const KernelParams params = {.launch = launch,
                               .q = static_cast<const __nv_bfloat16*>(p.q),
                               .k = static_cast<const __nv_bfloat16*>(p.k),
                               .num_queries = p.num_queries,
                               .num_keys = p.num_keys,
                               .kv_head_stride = p.kv_head_stride,
                               .num_heads = p.num_heads};
  const int per_block = p.block_tokens / p.stride;
  return p.head_dim == 128 ? LaunchHeadDim<128>(params, per_block, num_sms, stream)
                           : LaunchHeadDim<64>(params, per_block, num_sms, stream);
}

}  // namespace prefilld::kernels::cuda::sm80
