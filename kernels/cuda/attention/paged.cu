// Attention of one query over a paged cache. It is bound by memory: each K and V element is read
// once for a group of query heads that share it.
//
// The keys are split over CTAs. Each CTA stores its maximum, sum and unnormalised output per head
// in scratch memory, and a second kernel merges them. For the logits a thread of a CTA takes one
// key of the tile (the key's row is contiguous, so whole sectors are used), for P V two output
// columns.
#include <cuda_bf16.h>

#include <cmath>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device/arithmetic.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kKeyTile = kThreads;
constexpr int kHeadsPerCta = 8;  // query heads of one KV head; a larger group takes more CTAs

// The scratch memory for a head and a split: maximum (log2 scale), sum, then head_dim outputs.
__device__ __forceinline__ float* partial_of(const PagedAttentionParams& params, int head,
                                             int split) {
  return params.scratch +
         (static_cast<int64_t>(head) * kPagedAttentionMaxSplits + split) * (params.head_dim + 2);
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    paged_attention_kernel(PagedAttentionParams params, int tiles_per_split, float scale_log2) {
  constexpr int kColumnPairs = kHeadDim / 2;
  constexpr int kKeyGroups = kThreads / kColumnPairs;  // threads that share a column pair
  static_assert(kThreads % kColumnPairs == 0, "every thread has a column pair");
  __shared__ float q[kHeadsPerCta][kHeadDim];
  __shared__ float p[kHeadsPerCta][kKeyTile];
  __shared__ float rescale[kHeadsPerCta];
  __shared__ float merged[kKeyGroups][kHeadsPerCta][kHeadDim];

  const int group = params.num_heads / params.num_kv_heads;
  const int head_chunks = (group + kHeadsPerCta - 1) / kHeadsPerCta;
  const int kv_head = static_cast<int>(blockIdx.x) / head_chunks;
  const int chunk = static_cast<int>(blockIdx.x) % head_chunks;
  const int first_head = kv_head * group + chunk * kHeadsPerCta;
  const int num_heads = min(kHeadsPerCta, group - chunk * kHeadsPerCta);
  const int thread = static_cast<int>(threadIdx.x);
  const int split = static_cast<int>(blockIdx.y);
  const __nv_bfloat16* k_pool = static_cast<const __nv_bfloat16*>(params.k_pool);
  const __nv_bfloat16* v_pool = static_cast<const __nv_bfloat16*>(params.v_pool);

  for (int i = thread; i < kHeadsPerCta * kHeadDim; i += kThreads) {
    const int head = i / kHeadDim;
    q[head][i % kHeadDim] = head < num_heads
                                ? __bfloat162float(static_cast<const __nv_bfloat16*>(
                                      params.q)[static_cast<int64_t>(first_head) * kHeadDim + i])
                                : 0.0f;
  }
  __syncthreads();

  // The offset of a key's row in the pool, in elements.
  const auto row_of = [&](int64_t key) {
    const int64_t block = params.block_table[key / params.block_tokens];
    return block * params.block_stride + kv_head * params.head_stride +
           key % params.block_tokens * params.token_stride;
  };

  float out[kHeadsPerCta][2] = {};
  float max[kHeadsPerCta];  // that of head h is kept by warp h % 4, which reduces it
  float sum[kHeadsPerCta];  // likewise
#pragma unroll
  for (int h = 0; h < kHeadsPerCta; ++h) {
    max[h] = -INFINITY;
    sum[h] = 0.0f;
  }
  const int pair = thread % kColumnPairs;
  const int key_group = thread / kColumnPairs;
  const int warp = thread / 32;
  const int lane = thread % 32;

  const int64_t first_key = static_cast<int64_t>(split) * tiles_per_split * kKeyTile;
  const int64_t end_key =
      min(params.num_keys, first_key + static_cast<int64_t>(tiles_per_split) * kKeyTile);
  for (int64_t tile = first_key; tile < end_key; tile += kKeyTile) {
    const int keys = static_cast<int>(min(static_cast<int64_t>(kKeyTile), end_key - tile));
    float logit[kHeadsPerCta] = {};
    if (thread < keys) {
      const __nv_bfloat16* row = k_pool + row_of(tile + thread);
#pragma unroll 4
      for (int c = 0; c < kHeadDim; c += 8) {
        const uint4 eight = *reinterpret_cast<const uint4*>(row + c);
        const float2 k01 = device::unpack_bf16(eight.x);
        const float2 k23 = device::unpack_bf16(eight.y);
        const float2 k45 = device::unpack_bf16(eight.z);
        const float2 k67 = device::unpack_bf16(eight.w);
#pragma unroll
        for (int h = 0; h < kHeadsPerCta; ++h) {
          const float4 low = *reinterpret_cast<const float4*>(&q[h][c]);
          const float4 high = *reinterpret_cast<const float4*>(&q[h][c + 4]);
          logit[h] += low.x * k01.x + low.y * k01.y + low.z * k23.x + low.w * k23.y +
                      high.x * k45.x + high.y * k45.y + high.z * k67.x + high.w * k67.y;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeadsPerCta; ++h) {
      p[h][thread] = thread < keys ? logit[h] * scale_log2 : -INFINITY;
    }
    __syncthreads();
    // Softmax of the tile. Warp w takes the heads w and w + 4.
#pragma unroll
    for (int h = 0; h < kHeadsPerCta; ++h) {
      if (h % (kThreads / 32) != warp) continue;
      float tile_max = -INFINITY;
#pragma unroll
      for (int i = 0; i < kKeyTile / 32; ++i) tile_max = fmaxf(tile_max, p[h][i * 32 + lane]);
      const float new_max = fmaxf(max[h], device::warp_max(tile_max));
      const float factor = device::exp2_approx(max[h] - new_max);
      float tile_sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeyTile / 32; ++i) {
        const float probability = device::exp2_approx(p[h][i * 32 + lane] - new_max);
        p[h][i * 32 + lane] = probability;
        tile_sum += probability;
      }
      sum[h] = sum[h] * factor + device::warp_sum(tile_sum);
      max[h] = new_max;
      if (lane == 0) rescale[h] = factor;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeadsPerCta; ++h) {
      out[h][0] *= rescale[h];
      out[h][1] *= rescale[h];
    }
#pragma unroll 4
    for (int key = key_group; key < keys; key += kKeyGroups) {
      const float2 v = device::unpack_bf16(
          *reinterpret_cast<const uint32_t*>(v_pool + row_of(tile + key) + 2 * pair));
#pragma unroll
      for (int h = 0; h < kHeadsPerCta; ++h) {
        out[h][0] += p[h][key] * v.x;
        out[h][1] += p[h][key] * v.y;
      }
    }
    __syncthreads();  // p is free for the next tile
  }

#pragma unroll
  for (int h = 0; h < kHeadsPerCta; ++h) {
    merged[key_group][h][2 * pair] = out[h][0];
    merged[key_group][h][2 * pair + 1] = out[h][1];
    if (h % (kThreads / 32) == warp && lane == 0 && h < num_heads) {
      float* partial = partial_of(params, first_head + h, split);
      partial[0] = max[h];
      partial[1] = sum[h];
    }
  }
  __syncthreads();
  for (int i = thread; i < num_heads * kHeadDim; i += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int g = 0; g < kKeyGroups; ++g) total += merged[g][i / kHeadDim][i % kHeadDim];
    partial_of(params, first_head + i / kHeadDim, split)[2 + i % kHeadDim] = total;
  }
}

// Merges the splits of a head: one CTA per head, one thread per output column.
__global__ void combine_splits_kernel(PagedAttentionParams params, int num_splits) {
  const int head = static_cast<int>(blockIdx.x);
  const int column = static_cast<int>(threadIdx.x);
  float max = -INFINITY;
  for (int split = 0; split < num_splits; ++split) {
    max = fmaxf(max, partial_of(params, head, split)[0]);
  }
  float sum = 0.0f;
  float out = 0.0f;
  for (int split = 0; split < num_splits; ++split) {
    const float* partial = partial_of(params, head, split);
    const float weight = device::exp2_approx(partial[0] - max);
    sum += weight * partial[1];
    out += weight * partial[2 + column];
  }
  static_cast<__nv_bfloat16*>(params.out)[static_cast<int64_t>(head) * params.head_dim + column] =
      __float2bfloat16_rn(out / sum);
}

template <int kHeadDim>
cudaError_t Launch(const PagedAttentionParams& params, cudaStream_t stream) {
  const int group = params.num_heads / params.num_kv_heads;
  const int ctas = params.num_kv_heads * static_cast<int>(CeilDiv(group, kHeadsPerCta));
  const int64_t tiles = CeilDiv(params.num_keys, kKeyTile);
  const int tiles_per_split = static_cast<int>(CeilDiv(tiles, kPagedAttentionMaxSplits));
  const int num_splits = static_cast<int>(CeilDiv(tiles, tiles_per_split));
  const float scale_log2 = params.scale * static_cast<float>(M_LOG2E);
  paged_attention_kernel<kHeadDim>
      <<<dim3(ctas, num_splits), kThreads, 0, stream>>>(params, tiles_per_split, scale_log2);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  combine_splits_kernel<<<params.num_heads, kHeadDim, 0, stream>>>(params, num_splits);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchPagedAttention(const PagedAttentionParams& params, cudaStream_t stream) {
  if (params.num_keys <= 0 || params.scratch == nullptr || params.num_kv_heads <= 0 ||
      params.num_heads % params.num_kv_heads != 0) {
    return cudaErrorInvalidValue;
  }
  switch (params.head_dim) {
    case 64:
      return Launch<64>(params, stream);
    case 128:
      return Launch<128>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace prefilld::kernels::cuda
