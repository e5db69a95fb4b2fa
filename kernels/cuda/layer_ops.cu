// Embedding, RMSNorm and SwiGLU: each reads and writes its tensors once, 16 bytes a thread where
// rows are whole multiples of that.
#include "kernels/cuda/layer_ops.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// kWidth bf16 elements that travel in one access.
template <int kWidth>
struct alignas(2 * kWidth) Pack {
  __nv_bfloat16 e[kWidth];
};

template <int kWidth>
__device__ __forceinline__ const Pack<kWidth>* packs(const void* tensor, int64_t element) {
  return reinterpret_cast<const Pack<kWidth>*>(static_cast<const __nv_bfloat16*>(tensor) + element);
}
template <int kWidth>
__device__ __forceinline__ Pack<kWidth>* packs(void* tensor, int64_t element) {
  return reinterpret_cast<Pack<kWidth>*>(static_cast<__nv_bfloat16*>(tensor) + element);
}

// One CTA per token.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) embedding_kernel(EmbeddingParams params) {
  const int64_t token = blockIdx.x;
  const Pack<kWidth>* source =
      packs<kWidth>(params.table, static_cast<int64_t>(params.ids[token]) * params.hidden);
  Pack<kWidth>* destination = packs<kWidth>(params.y, token * params.hidden);
  for (int64_t i = threadIdx.x; i < params.hidden / kWidth; i += kThreads) {
    destination[i] = source[i];
  }
}

// One CTA per token. The second read of the row hits L1 or L2.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams params) {
  __shared__ float warp_sums[kThreads / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * params.hidden;
  const Pack<kWidth>* x = packs<kWidth>(params.x, row);
  const Pack<kWidth>* weight = packs<kWidth>(params.weight, 0);
  Pack<kWidth>* y = packs<kWidth>(params.y, row);
  const int64_t num_packs = params.hidden / kWidth;

  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < num_packs; i += kThreads) {
    const Pack<kWidth> pack = x[i];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float value = __bfloat162float(pack.e[e]);
      sum += value * value;
    }
  }
  sum = device::warp_sum(sum);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += warp_sums[w];
  const float inverse_rms = rsqrtf(sum / static_cast<float>(params.hidden) + params.epsilon);

  for (int64_t i = threadIdx.x; i < num_packs; i += kThreads) {
    const Pack<kWidth> pack = x[i];
    const Pack<kWidth> gain = weight[i];
    Pack<kWidth> result;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      result.e[e] = __float2bfloat16_rn(__bfloat162float(pack.e[e]) * inverse_rms *
                                        __bfloat162float(gain.e[e]));
    }
    y[i] = result;
  }
}

// grid.x covers a row, grid.y strides over the tokens.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwiGluParams params) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (column >= params.intermediate) return;
  for (int64_t token = blockIdx.y; token < params.num_tokens; token += gridDim.y) {
    const int64_t row = token * 2 * params.intermediate + column;
    const Pack<kWidth> gate = *packs<kWidth>(params.gate_up, row);
    const Pack<kWidth> up = *packs<kWidth>(params.gate_up, row + params.intermediate);
    Pack<kWidth> result;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float g = __bfloat162float(gate.e[e]);
      const float silu = g / (1.0f + __expf(-g));
      result.e[e] = __float2bfloat16_rn(silu * __bfloat162float(up.e[e]));
    }
    *packs<kWidth>(params.y, token * params.intermediate + column) = result;
  }
}

}  // namespace

cudaError_t LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const auto kernel = params.hidden % 8 == 0 ? embedding_kernel<8> : embedding_kernel<1>;
  kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const auto kernel = params.hidden % 8 == 0 ? rms_norm_kernel<8> : rms_norm_kernel<1>;
  kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const int width = params.intermediate % 8 == 0 ? 8 : 1;
  const int64_t per_cta = static_cast<int64_t>(kThreads) * width;
  const dim3 grid(static_cast<unsigned>((params.intermediate + per_cta - 1) / per_cta),
                  static_cast<unsigned>(std::min<int64_t>(params.num_tokens, 65535)));
  const auto kernel = width == 8 ? swiglu_kernel<8> : swiglu_kernel<1>;
  kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
