// Block means of queries and keys, and the softmax of their products.
//
// The time for the means is that of reading Q and K of the head, 4 d bytes a token. The products of
// the n means take n^2 d multiply-adds: little beside that up to n = block_tokens, and beyond it a
// small part of what attention takes.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/pattern.h"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxHeadDim = 256;
static_assert(kMaxHeadDim <= kThreads, "one thread loads one element of the row's mean");

// Computes the means of the queries' blocks and of the keys' blocks. grid: (n, queries or keys);
// one thread per element of head_dim.
__global__ void block_means_kernel(PooledMassParams params, int64_t num_blocks) {
  const bool keys = blockIdx.y == 1;
  const int64_t kv_head = params.head / (params.num_heads / params.num_kv_heads);
  const auto* x =
      keys ? static_cast<const __nv_bfloat16*>(params.k) + kv_head * params.kv_head_stride
           : static_cast<const __nv_bfloat16*>(params.q) + int64_t{params.head} * params.head_dim;
  const int64_t stride = keys ? params.head_dim : int64_t{params.num_heads} * params.head_dim;
  const int64_t first = int64_t{blockIdx.x} * params.block_tokens;
  const int64_t end = min(first + params.block_tokens, params.num_tokens);
  float sum = 0.0f;
  for (int64_t token = first; token < end; ++token) {
    sum += __bfloat162float(x[token * stride + threadIdx.x]);
  }
  params.scratch[(blockIdx.y * num_blocks + blockIdx.x) * params.head_dim + threadIdx.x] =
      sum / static_cast<float>(end - first);
}

// Computes a row of block mass. One CTA takes one query block; a warp takes every eighth key block,
// and its lanes share head_dim.
__global__ void __launch_bounds__(kThreads)
    pooled_mass_kernel(PooledMassParams params, int64_t num_blocks) {
  __shared__ float q_mean[kMaxHeadDim];
  __shared__ float reduced[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int64_t row = blockIdx.x;
  const float* k_means = params.scratch + num_blocks * params.head_dim;
  float* mass = params.block_mass + row * num_blocks;
  if (thread < params.head_dim) q_mean[thread] = params.scratch[row * params.head_dim + thread];
  __syncthreads();

  float max = -INFINITY;
  for (int64_t block = thread / 32; block <= row; block += kWarps) {
    float product = 0.0f;
    for (int d = lane; d < params.head_dim; d += 32) {
      product += q_mean[d] * k_means[block * params.head_dim + d];
    }
    product = device::warp_sum(product) * params.scale;
    if (lane == 0) mass[block] = product;
    max = fmaxf(max, product);
  }
  // The barriers inside also make all of the row's products visible.
  max = device::combine_warps<kWarps>(device::warp_max(max), reduced,
                                      [](float a, float b) { return fmaxf(a, b); });
  float sum = 0.0f;
  for (int64_t block = thread; block <= row; block += kThreads) {
    mass[block] = __expf(mass[block] - max);
    sum += mass[block];
  }
  sum = device::combine_warps<kWarps>(device::warp_sum(sum), reduced,
                                      [](float a, float b) { return a + b; });
  for (int64_t block = thread; block < num_blocks; block += kThreads) {
    mass[block] = block <= row ? mass[block] / sum : 0.0f;
  }
}

}  // namespace

cudaError_t LaunchPooledMass(const PooledMassParams& params, cudaStream_t stream) {
  if (params.head_dim <= 0 || params.head_dim % 32 != 0 || params.head_dim > kMaxHeadDim ||
      params.num_tokens <= 0 || params.block_tokens <= 0 || params.num_kv_heads <= 0 ||
      params.num_heads % params.num_kv_heads != 0) {
    return cudaErrorInvalidValue;
  }
  const int64_t num_blocks = CeilDiv(params.num_tokens, params.block_tokens);
  const auto rows = static_cast<unsigned>(num_blocks);
  block_means_kernel<<<dim3(rows, 2), params.head_dim, 0, stream>>>(params, num_blocks);
  pooled_mass_kernel<<<rows, kThreads, 0, stream>>>(params, num_blocks);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
