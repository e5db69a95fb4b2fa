// Embedding, RMSNorm, SwiGLU and the log-probabilities of tokens. All are bound by memory; the
// first three read and write their tensors once, 16 bytes a thread.
#include "kernels/cuda/layer_ops.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// The number of bf16 elements that travel in one access.
constexpr int kWidth = 8;
struct alignas(2 * kWidth) Pack {
  __nv_bfloat16 e[kWidth];
};

__device__ __forceinline__ const Pack* packs(const void* tensor, int64_t element) {
  return reinterpret_cast<const Pack*>(static_cast<const __nv_bfloat16*>(tensor) + element);
}
__device__ __forceinline__ Pack* packs(void* tensor, int64_t element) {
  return reinterpret_cast<Pack*>(static_cast<__nv_bfloat16*>(tensor) + element);
}

// One CTA per token.
__global__ void __launch_bounds__(kThreads) embedding_kernel(EmbeddingParams params) {
  const int64_t token = blockIdx.x;
  const Pack* source = packs(params.table, static_cast<int64_t>(params.ids[token]) * params.hidden);
  Pack* destination = packs(params.y, token * params.hidden);
  for (int64_t i = threadIdx.x; i < params.hidden / kWidth; i += kThreads) {
    destination[i] = source[i];
  }
}

// One CTA per token. The second read of the row hits L1 or L2.
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams params) {
  __shared__ float warp_sums[kThreads / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * params.hidden;
  const Pack* x = packs(params.x, row);
  const Pack* weight = packs(params.weight, 0);
  Pack* y = packs(params.y, row);
  const int64_t num_packs = params.hidden / kWidth;

  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < num_packs; i += kThreads) {
    const Pack pack = x[i];
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
    const Pack pack = x[i];
    const Pack gain = weight[i];
    Pack result;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      result.e[e] = __float2bfloat16_rn(__bfloat162float(pack.e[e]) * inverse_rms *
                                        __bfloat162float(gain.e[e]));
    }
    y[i] = result;
  }
}

// grid.x covers a row, grid.y strides over the tokens.
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwiGluParams params) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (column >= params.intermediate) return;
  for (int64_t token = blockIdx.y; token < params.num_tokens; token += gridDim.y) {
    const int64_t row = token * 2 * params.intermediate + column;
    const Pack gate = *packs(params.gate_up, row);
    const Pack up = *packs(params.gate_up, row + params.intermediate);
    Pack result;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float g = __bfloat162float(gate.e[e]);
      const float silu = g / (1.0f + __expf(-g));
      result.e[e] = __float2bfloat16_rn(silu * __bfloat162float(up.e[e]));
    }
    *packs(params.y, token * params.intermediate + column) = result;
  }
}

// One CTA per token. The second read of the row hits L2.
__global__ void __launch_bounds__(kThreads) token_logprobs_kernel(TokenLogprobsParams params) {
  __shared__ float warp_results[kThreads / 32];
  const auto* logits = static_cast<const __nv_bfloat16*>(params.logits) +
                       static_cast<int64_t>(blockIdx.x) * params.vocab_size;
  constexpr int kWarps = kThreads / 32;
  float best = -INFINITY;
  for (int64_t i = threadIdx.x; i < params.vocab_size; i += kThreads) {
    best = fmaxf(best, __bfloat162float(logits[i]));
  }
  best = device::combine_warps<kWarps>(device::warp_max(best), warp_results,
                                       [](float a, float b) { return fmaxf(a, b); });
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < params.vocab_size; i += kThreads) {
    sum += __expf(__bfloat162float(logits[i]) - best);
  }
  sum = device::combine_warps<kWarps>(device::warp_sum(sum), warp_results,
                                      [](float a, float b) { return a + b; });
  if (threadIdx.x != 0) return;
  const float log_sum = logf(sum);
  const float target = __bfloat162float(logits[params.targets[blockIdx.x]]);
  params.logprobs[blockIdx.x] = target - best - log_sum;
  params.best_logprobs[blockIdx.x] = -log_sum;
}

}  // namespace

cudaError_t LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream) {
  if (params.hidden % kWidth != 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  embedding_kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.hidden % kWidth != 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  rms_norm_kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream) {
  if (params.intermediate % kWidth != 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  constexpr int64_t kPerCta = static_cast<int64_t>(kThreads) * kWidth;
  const dim3 grid(static_cast<unsigned>((params.intermediate + kPerCta - 1) / kPerCta),
                  static_cast<unsigned>(std::min<int64_t>(params.num_tokens, 65535)));
  swiglu_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchTokenLogprobs(const TokenLogprobsParams& params, cudaStream_t stream) {
  if (params.vocab_size <= 0) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  token_logprobs_kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
