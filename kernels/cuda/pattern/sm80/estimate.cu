// The estimate of the last query block: where every head's attention goes, by key and by offset.
//
// The work per head is two Q K^T products of [B, d] x [d, num_keys]. For a key they take 4 B d
// FLOPs and read 2 d bytes of K each time, so the tensor cores bound the estimate. The logits must
// not go to memory: [heads, 128, N] in fp32 would be 1.9 GB at 28 heads and 128k keys. Therefore
// 1. the first pass keeps only each row's maximum and sum per chunk of keys;
// 2. a small kernel merges them;
// 3. the second pass computes the logits anew, and sums their probabilities over columns and
// diagonals
//    on chip. A CTA takes one head and one chunk. Diagonals leave a chunk on the side of lower
//    keys; the CTA writes that overhang to scratch memory;
// 4. the last kernel adds it to the chunk that it belongs to. There are no atomics, so the result
// is
//    the same every time.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/attention/sm80/tile.cuh"
#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/shared_address.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pattern/plan.h"
#include "kernels/cuda/pattern/sm80/estimate.h"

namespace prefilld::kernels::cuda::sm80 {
namespace {

constexpr int kKeyTile = 64;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

struct KernelParams {
  EstimateParams op;
  EstimatePlan plan;
  float scale_log2 = 0.0f;
  int num_key_blocks = 0;
  float2* row_sums = nullptr;  // [heads, chunks, rows]: maximum (log2 scale) and sum
  float* row_lse = nullptr;    // [heads, rows]: log2 of (the whole row's sum * num_queries)
  float* overhangs =
      nullptr;  // [heads, chunks, kMaxEstimateRows]; chunk 0 has none and is not used
};

template <int kHeadDim_, int kRows_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;  // query rows held, at least num_queries
  static constexpr int kRowTiles = kRows / (16 * kWarps);
  // The pitch is odd, so that threads on neighbouring diagonals read different banks. It is 5 more
  // than a multiple of 32, so that at most two of the lanes that write an accumulator share a bank.
  static constexpr int kPitch = kKeyTile + 5;
};

template <typename Config>
struct alignas(128) SharedMemory {
  __nv_bfloat16 q[Config::kRows * Config::kHeadDim];
  __nv_bfloat16 k[2][kKeyTile * Config::kHeadDim];
};

// The shared memory of the second pass. The sums of the chunk's diagonals follow it.
template <typename Config>
struct MassSharedMemory : SharedMemory<Config> {
  float p[Config::kRows * Config::kPitch];
  float column_sums[kWarps][kKeyTile];
};

// Calls body(logits in log2 scale, first key) for each key tile of a chunk. The logits of keys
// after a row's own position are -infinity.
template <typename Config, typename Body>
__device__ __forceinline__ void for_each_tile(const KernelParams& params,
                                              SharedMemory<Config>& shared, int head, int chunk,
                                              Body body) {
  const EstimateParams& op = params.op;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = static_cast<int>(threadIdx.x) / 32 * Config::kRowTiles * 16;
  const int kv_head = head / (op.num_heads / op.num_kv_heads);
  const __nv_bfloat16* k = static_cast<const __nv_bfloat16*>(op.k) + kv_head * op.kv_head_stride;
  const int64_t first_key = chunk * params.plan.chunk_keys;
  const int64_t end_key = min(op.num_keys, first_key + params.plan.chunk_keys);
  const int num_tiles = static_cast<int>((end_key - first_key + kKeyTile - 1) / kKeyTile);
  const auto load_keys = [&](int tile) {
    const int64_t key = first_key + static_cast<int64_t>(tile) * kKeyTile;
    load_tile_async<kKeyTile, Config::kHeadDim, kThreads>(
        device::shared_address(shared.k[tile % 2]), k + key * Config::kHeadDim, Config::kHeadDim, 0,
        static_cast<int>(min(end_key - key, static_cast<int64_t>(kKeyTile))));
    device::commit_async_copies();
  };

  load_tile_async<Config::kRows, Config::kHeadDim, kThreads>(
      device::shared_address(shared.q),
      static_cast<const __nv_bfloat16*>(op.q) + static_cast<int64_t>(head) * Config::kHeadDim,
      static_cast<int64_t>(op.num_heads) * Config::kHeadDim, 0, static_cast<int>(op.num_queries));
  load_keys(0);
  const int64_t first_position = op.num_keys - op.num_queries;
  for (int tile = 0; tile < num_tiles; ++tile) {
    device::wait_async_copies<0>();
    __syncthreads();  // the tile is there, and all warps are done with the one before
    if (tile + 1 < num_tiles) load_keys(tile + 1);
    float s[Config::kRowTiles][kKeyTile / 8][4];
    multiply_qk<Config::kHeadDim, Config::kRowTiles, kKeyTile>(
        s, device::shared_address(shared.q), first_row, device::shared_address(shared.k[tile % 2]));
    const int64_t tile_key = first_key + static_cast<int64_t>(tile) * kKeyTile;
    // Row i sees the keys of the tile up to last_key + i.
    const int last_key =
        static_cast<int>(min(first_position - tile_key, static_cast<int64_t>(kKeyTile)));
    const bool all_visible = last_key >= kKeyTile - 1;
#pragma unroll
    for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kKeyTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row =
              first_row + 16 * i + device::element_row(e) + device::accumulator_row(lane);
          const int key = 8 * j + device::accumulator_column(lane) + device::element_column(e);
          const bool visible = all_visible || key <= last_key + row;
          s[i][j][e] = visible ? s[i][j][e] * params.scale_log2 : -INFINITY;
        }
      }
    }
    body(s, tile_key);
  }
}

// First pass: each row's maximum and sum over a chunk. grid: (chunks, heads).
template <typename Config>
__global__ void __launch_bounds__(kThreads)
    estimate_row_sums_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<SharedMemory<Config>*>(shared_bytes);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = static_cast<int>(threadIdx.x) / 32 * Config::kRowTiles * 16;
  const int chunk = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  float row_max[2 * Config::kRowTiles];
  float row_sum[2 * Config::kRowTiles];  // over the lane's own columns
#pragma unroll
  for (int i = 0; i < 2 * Config::kRowTiles; ++i) {
    row_max[i] = -INFINITY;
    row_sum[i] = 0.0f;
  }
  for_each_tile<Config>(
      params, shared, head, chunk, [&](float(&s)[Config::kRowTiles][kKeyTile / 8][4], int64_t) {
#pragma unroll
        for (int i = 0; i < 2 * Config::kRowTiles; ++i) {
          const int half = 2 * (i % 2);
          float tile_max = -INFINITY;
#pragma unroll
          for (int j = 0; j < kKeyTile / 8; ++j) {
            tile_max = fmaxf(tile_max, fmaxf(s[i / 2][j][half], s[i / 2][j][half + 1]));
          }
          const float new_max = fmaxf(row_max[i], device::quad_max(tile_max));
          // A row that has seen no key yet has no maximum to be relative to.
          const float reference = new_max == -INFINITY ? 0.0f : new_max;
          float sum = row_sum[i] * device::exp2_approx(row_max[i] - reference);
#pragma unroll
          for (int j = 0; j < kKeyTile / 8; ++j) {
            sum += device::exp2_approx(s[i / 2][j][half] - reference) +
                   device::exp2_approx(s[i / 2][j][half + 1] - reference);
          }
          row_max[i] = new_max;
          row_sum[i] = sum;
        }
      });
  float2* row_sums = params.row_sums +
                     (static_cast<int64_t>(head) * params.plan.num_chunks + chunk) * Config::kRows;
#pragma unroll
  for (int i = 0; i < 2 * Config::kRowTiles; ++i) {
    const float sum = device::quad_sum(row_sum[i]);
    if (lane % 4 == 0) {
      row_sums[first_row + 8 * i + device::accumulator_row(lane)] = make_float2(row_max[i], sum);
    }
  }
}

// Merges the chunks' maxima and sums: one CTA per head, one thread per row.
__global__ void merge_row_sums_kernel(const __grid_constant__ KernelParams params) {
  const int rows = static_cast<int>(blockDim.x);
  const int row = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.x;
  const float2* row_sums = params.row_sums + head * params.plan.num_chunks * rows + row;
  float max = -INFINITY;
  float sum = 0.0f;
  for (int chunk = 0; chunk < params.plan.num_chunks; ++chunk) {
    const float2 part = row_sums[static_cast<int64_t>(chunk) * rows];
    if (part.x == -INFINITY) continue;
    const float new_max = fmaxf(max, part.x);
    sum = sum * device::exp2_approx(max - new_max) + part.y * device::exp2_approx(part.x - new_max);
    max = new_max;
  }
  // The number of queries makes each row's mass its share of the mean. Rows that hold no query get
  // no mass.
  const float num_queries = static_cast<float>(params.op.num_queries);
  params.row_lse[head * rows + row] =
      row < params.op.num_queries ? max + device::log2_approx(sum * num_queries) : INFINITY;
}

// Second pass: the mass on each column and diagonal of a chunk. grid: (chunks, heads).
template <typename Config>
__global__ void __launch_bounds__(kThreads)
    estimate_mass_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<MassSharedMemory<Config>*>(shared_bytes);
  float* diagonal_sums = reinterpret_cast<float*>(shared_bytes + sizeof(MassSharedMemory<Config>));
  const EstimateParams& op = params.op;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int first_row = warp * Config::kRowTiles * 16;
  const int chunk = static_cast<int>(blockIdx.x);
  const int64_t head = blockIdx.y;
  const int64_t first_key = chunk * params.plan.chunk_keys;
  // Keys of the chunk, rounded up to whole tiles.
  const int keys = static_cast<int>(
      (min(op.num_keys - first_key, params.plan.chunk_keys) + kKeyTile - 1) / kKeyTile * kKeyTile);
  const int num_sums = keys + Config::kRows - 1;
  for (int i = thread; i < num_sums; i += kThreads) diagonal_sums[i] = 0.0f;

  float row_lse[2 * Config::kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * Config::kRowTiles; ++i) {
    row_lse[i] =
        params.row_lse[head * Config::kRows + first_row + 8 * i + device::accumulator_row(lane)];
  }
  for_each_tile<Config>(
      params, shared, static_cast<int>(head), chunk,
      [&](float(&s)[Config::kRowTiles][kKeyTile / 8][4], int64_t tile_key) {
  // Probabilities go to shared memory; columns are summed on the way.
#pragma unroll
        for (int j = 0; j < kKeyTile / 8; ++j) {
          float column_sum[2] = {};
#pragma unroll
          for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float p = device::exp2_approx(s[i][j][e] - row_lse[2 * i + e / 2]);
              column_sum[e % 2] += p;
              const int row =
                  first_row + 16 * i + device::element_row(e) + device::accumulator_row(lane);
              const int column =
                  8 * j + device::accumulator_column(lane) + device::element_column(e);
              shared.p[row * Config::kPitch + column] = p;
            }
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            column_sum[e] += __shfl_xor_sync(0xffffffffu, column_sum[e], 4);
            column_sum[e] += __shfl_xor_sync(0xffffffffu, column_sum[e], 8);
            column_sum[e] += __shfl_xor_sync(0xffffffffu, column_sum[e], 16);
            if (lane < 4) shared.column_sums[warp][8 * j + 2 * lane + e] = column_sum[e];
          }
        }
        __syncthreads();
        if (thread < kKeyTile && tile_key + thread < op.num_keys) {
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += shared.column_sums[w][thread];
          op.vertical[head * op.num_keys + tile_key + thread] = sum;
        }
        // Diagonal d of the tile holds the elements with row - column = d - (kKeyTile - 1); in the
        // chunk it is the sum number d + (keys after this tile).
        const int keys_after = keys - kKeyTile - static_cast<int>(tile_key - first_key);
        // Thread t takes the lower diagonal t and, where the tile's upper right corner has one, the
        // diagonal kRows + t: together always kKeyTile elements, one in each column.
        if (thread < Config::kRows) {
          const int first_of_lower = kKeyTile - 1 - thread;  // column where diagonal t begins
          const float* lower = shared.p + (thread - (kKeyTile - 1)) * Config::kPitch;
          const float* upper = lower + Config::kRows * Config::kPitch;
          float lower_sum = 0.0f;
          float upper_sum = 0.0f;
#pragma unroll
          for (int column = 0; column < kKeyTile; ++column) {
            const bool in_lower = column >= first_of_lower;
            const float p = (in_lower ? lower : upper)[column * (Config::kPitch + 1)];
            lower_sum += in_lower ? p : 0.0f;
            upper_sum += in_lower ? 0.0f : p;
          }
          diagonal_sums[keys_after + thread] += lower_sum;
          if (thread < kKeyTile - 1)
            diagonal_sums[keys_after + Config::kRows + thread] += upper_sum;
        }
        // No barrier is needed here: the next tile's first one comes before its probabilities are
        // written.
      });
  __syncthreads();

  // Sum i of the chunk belongs to offset `lowest + i`. Offsets from lowest + keys on are also those
  // of the chunk before, if there is one, which owns them.
  const int64_t lowest = op.num_keys - op.num_queries - (first_key + keys - 1);
  const int own = chunk == 0 ? num_sums : keys;
  for (int i = thread; i < own; i += kThreads) {
    const int64_t offset = lowest + i;
    if (offset >= 0 && offset < op.num_keys) {
      op.slash[head * op.num_keys + offset] = diagonal_sums[i];
    }
  }
  if (chunk > 0) {
    float* overhang = params.overhangs + (head * params.plan.num_chunks + chunk) * kMaxEstimateRows;
    for (int i = thread; i < Config::kRows - 1; i += kThreads) {
      overhang[i] = diagonal_sums[keys + i];
    }
  }
}

// Adds the overhangs of the diagonals and sums the columns of each block. grid: (blocks, heads); a
// CTA of block_tokens threads.
__global__ void finish_estimate_kernel(const __grid_constant__ KernelParams params) {
  __shared__ float warp_sums[kMaxEstimateRows / 32];
  const EstimateParams& op = params.op;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.y;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * op.block_tokens + thread;
  const float column = index < op.num_keys ? op.vertical[head * op.num_keys + index] : 0.0f;
  const float sum = device::warp_sum(column);
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    float total = 0.0f;
    for (int w = 0; w < op.block_tokens / 32; ++w) total += warp_sums[w];
    op.block_mass[head * params.num_key_blocks + blockIdx.x] = total;
  }
  // The first CTAs of a head take one chunk's overhang each.
  for (int chunk = 1 + static_cast<int>(blockIdx.x); chunk < params.plan.num_chunks;
       chunk += static_cast<int>(gridDim.x)) {
    const int64_t offset =
        op.num_keys - op.num_queries - (chunk * params.plan.chunk_keys - 1) + thread;
    if (thread >= op.block_tokens - 1 || offset < 0 || offset >= op.num_keys) continue;
    op.slash[head * op.num_keys + offset] +=
        params.overhangs[(head * params.plan.num_chunks + chunk) * kMaxEstimateRows + thread];
  }
}

template <typename Config>
cudaError_t Launch(const KernelParams& params, cudaStream_t stream) {
  const dim3 grid(params.plan.num_chunks, params.op.num_heads);
  cudaError_t error = LaunchKernel(estimate_row_sums_kernel<Config>, grid, kThreads,
                                   sizeof(SharedMemory<Config>), stream, params);
  if (error != cudaSuccess) return error;
  merge_row_sums_kernel<<<params.op.num_heads, Config::kRows, 0, stream>>>(params);
  const size_t mass_bytes =
      sizeof(MassSharedMemory<Config>) +
      static_cast<size_t>(params.plan.chunk_keys + Config::kRows) * sizeof(float);
  error = LaunchKernel(estimate_mass_kernel<Config>, grid, kThreads, mass_bytes, stream, params);
  if (error != cudaSuccess) return error;
  finish_estimate_kernel<<<dim3(params.num_key_blocks, params.op.num_heads), params.op.block_tokens,
                           0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchEstimate(const EstimateParams& params, cudaStream_t stream) {
  KernelParams kernel_params;
  kernel_params.op = params;
  kernel_params.plan = PlanEstimate(params.num_keys);
  kernel_params.scale_log2 = params.scale * static_cast<float>(M_LOG2E);
  kernel_params.num_key_blocks = static_cast<int>(CeilDiv(params.num_keys, params.block_tokens));
  const EstimateScratch scratch =
      LayOutEstimateScratch(kernel_params.plan, params.num_heads, params.block_tokens);
  float* floats = static_cast<float*>(params.scratch);
  kernel_params.row_sums = reinterpret_cast<float2*>(floats + scratch.row_sums);
  kernel_params.row_lse = floats + scratch.row_lse;
  kernel_params.overhangs = floats + scratch.overhangs;
  if (params.head_dim == 128) {
    return params.block_tokens == 128 ? Launch<Config<128, 128>>(kernel_params, stream)
                                      : Launch<Config<128, 64>>(kernel_params, stream);
  }
  return params.block_tokens == 128 ? Launch<Config<64, 128>>(kernel_params, stream)
                                    : Launch<Config<64, 64>>(kernel_params, stream);
}

}  // namespace prefilld::kernels::cuda::sm80
