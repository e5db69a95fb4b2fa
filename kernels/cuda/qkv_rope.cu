// Splits, normalises and rotates the fused projection. Memory-bound: the projection is read once
// and written once. A CTA takes a few tokens, computes their angles once and shares them among all
// heads; a warp takes one head of one token.
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/layer_ops.h"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerCta = 4;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxPairs = kMaxHeadDim / 2;

// cos and sin of position * inv_freq. The angle of a late position is large, so it is counted in
// turns and whole turns are taken off in double precision; what is left is exact enough in fp32.
__device__ __forceinline__ float2 rotation(int64_t position, float inv_freq) {
  constexpr double kTurnsPerRadian = 0.15915494309189533577;
  const double turns =
      static_cast<double>(position) * (static_cast<double>(inv_freq) * kTurnsPerRadian);
  const float half_turns = 2.0f * static_cast<float>(turns - rint(turns));
  float2 cos_sin;
  sincospif(half_turns, &cos_sin.y, &cos_sin.x);
  return cos_sin;
}

// One head of one token: elements (2i, 2i + 1) of both halves by one lane.
__device__ void rotate_head(const __nv_bfloat16* source, const __nv_bfloat16* norm,
                            const float2* cos_sin, __nv_bfloat16* destination, int head_dim,
                            float norm_epsilon, int lane) {
  const int half = head_dim / 2;
  float inverse_rms = 1.0f;
  if (norm != nullptr) {
    float sum = 0.0f;
    for (int i = 2 * lane; i < head_dim; i += 64) {
      const float2 pair = device::unpack_bf16(*reinterpret_cast<const uint32_t*>(source + i));
      sum += pair.x * pair.x + pair.y * pair.y;
    }
    inverse_rms = rsqrtf(device::warp_sum(sum) / static_cast<float>(head_dim) + norm_epsilon);
  }
  for (int i = 2 * lane; i < half; i += 64) {
    float2 first = device::unpack_bf16(*reinterpret_cast<const uint32_t*>(source + i));
    float2 second = device::unpack_bf16(*reinterpret_cast<const uint32_t*>(source + half + i));
    if (norm != nullptr) {
      const float2 first_gain = device::unpack_bf16(*reinterpret_cast<const uint32_t*>(norm + i));
      const float2 second_gain =
          device::unpack_bf16(*reinterpret_cast<const uint32_t*>(norm + half + i));
      first.x *= inverse_rms * first_gain.x;
      first.y *= inverse_rms * first_gain.y;
      second.x *= inverse_rms * second_gain.x;
      second.y *= inverse_rms * second_gain.y;
    }
    const float2 turn0 = cos_sin[i];
    const float2 turn1 = cos_sin[i + 1];
    *reinterpret_cast<uint32_t*>(destination + i) = device::pack_bf16(
        first.x * turn0.x - second.x * turn0.y, first.y * turn1.x - second.y * turn1.y);
    *reinterpret_cast<uint32_t*>(destination + half + i) = device::pack_bf16(
        second.x * turn0.x + first.x * turn0.y, second.y * turn1.x + first.y * turn1.y);
  }
}

__global__ void __launch_bounds__(kThreads) qkv_rope_kernel(QkvRopeParams params) {
  __shared__ float2 cos_sin[kTokensPerCta][kMaxPairs];
  const int half = params.head_dim / 2;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokensPerCta;
  const int num_tokens =
      static_cast<int>(min(static_cast<int64_t>(kTokensPerCta), params.num_tokens - first_token));
  for (int i = static_cast<int>(threadIdx.x); i < num_tokens * half; i += kThreads) {
    const float2 turn =
        rotation(params.first_position + first_token + i / half, params.inv_freq[i % half]);
    cos_sin[i / half][i % half] =
        make_float2(turn.x * params.attention_factor, turn.y * params.attention_factor);
  }
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int heads = params.num_heads + 2 * params.num_kv_heads;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < num_tokens * heads; i += kThreads / 32) {
    const int64_t token = first_token + i / heads;
    const int head = i % heads;
    const __nv_bfloat16* source =
        static_cast<const __nv_bfloat16*>(params.qkv) + (token * heads + head) * params.head_dim;
    if (head < params.num_heads) {
      rotate_head(source, static_cast<const __nv_bfloat16*>(params.q_norm), cos_sin[i / heads],
                  static_cast<__nv_bfloat16*>(params.q) +
                      (token * params.num_heads + head) * params.head_dim,
                  params.head_dim, params.norm_epsilon, lane);
      continue;
    }
    const bool is_key = head < params.num_heads + params.num_kv_heads;
    const int kv_head = head - params.num_heads - (is_key ? 0 : params.num_kv_heads);
    const int64_t offset = kv_head * params.kv_head_stride + token * params.kv_token_stride;
    if (is_key) {
      rotate_head(source, static_cast<const __nv_bfloat16*>(params.k_norm), cos_sin[i / heads],
                  static_cast<__nv_bfloat16*>(params.k) + offset, params.head_dim,
                  params.norm_epsilon, lane);
    } else {
      __nv_bfloat16* destination = static_cast<__nv_bfloat16*>(params.v) + offset;
      for (int e = 2 * lane; e < params.head_dim; e += 64) {
        *reinterpret_cast<uint32_t*>(destination + e) =
            *reinterpret_cast<const uint32_t*>(source + e);
      }
    }
  }
}

}  // namespace

cudaError_t LaunchQkvRope(const QkvRopeParams& params, cudaStream_t stream) {
  if (params.head_dim % 4 != 0 || params.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  const int64_t ctas = (params.num_tokens + kTokensPerCta - 1) / kTokensPerCta;
  qkv_rope_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
