// Splits, normalises and rotates the fused projection. It is bound by memory: the projection is
// read once and written once. A CTA takes a few tokens, computes their angles once and shares them
// among all heads. A few lanes take one head of one token, eight pairs of elements each, so that
// every access is 16 bytes.
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/layer_ops.h"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerCta = 4;

// Returns cos and sin of position * inv_freq. The angle of a late position is large. So it is
// counted in turns, and whole turns are taken off in double precision; the rest is exact enough in
// fp32.
__device__ __forceinline__ float2 rotation(int64_t position, float inv_freq) {
  constexpr double kTurnsPerRadian = 0.15915494309189533577;
  const double turns =
      static_cast<double>(position) * (static_cast<double>(inv_freq) * kTurnsPerRadian);
  const float half_turns = 2.0f * static_cast<float>(turns - rint(turns));
  float2 cos_sin;
  sincospif(half_turns, &cos_sin.y, &cos_sin.x);
  return cos_sin;
}

// Eight pairs of elements of one head, kept as fp32.
struct Octet {
  float e[8];
};
__device__ __forceinline__ Octet load_octet(const __nv_bfloat16* source) {
  const uint4 bits = *reinterpret_cast<const uint4*>(source);
  const float2 pairs[4] = {device::unpack_bf16(bits.x), device::unpack_bf16(bits.y),
                           device::unpack_bf16(bits.z), device::unpack_bf16(bits.w)};
  return {pairs[0].x, pairs[0].y, pairs[1].x, pairs[1].y,
          pairs[2].x, pairs[2].y, pairs[3].x, pairs[3].y};
}
__device__ __forceinline__ void store_octet(__nv_bfloat16* destination, const Octet& octet) {
  *reinterpret_cast<uint4*>(destination) = make_uint4(
      device::pack_bf16(octet.e[0], octet.e[1]), device::pack_bf16(octet.e[2], octet.e[3]),
      device::pack_bf16(octet.e[4], octet.e[5]), device::pack_bf16(octet.e[6], octet.e[7]));
}

// The destination of one head of one token, and what is done to it on the way.
struct HeadRoute {
  __nv_bfloat16* destination;
  const __nv_bfloat16* norm;  // [head_dim]; null: it is not normalised
  bool rotate;
};
__device__ __forceinline__ HeadRoute route_of(const QkvRopeParams& params, int64_t token,
                                              int head) {
  if (head < params.num_heads) {
    return {
        static_cast<__nv_bfloat16*>(params.q) + (token * params.num_heads + head) * params.head_dim,
        static_cast<const __nv_bfloat16*>(params.q_norm), true};
  }
  const bool is_key = head < params.num_heads + params.num_kv_heads;
  const int kv_head = head - params.num_heads - (is_key ? 0 : params.num_kv_heads);
  return {static_cast<__nv_bfloat16*>(is_key ? params.k : params.v) +
              kv_head * params.kv_head_stride + token * params.kv_token_stride,
          static_cast<const __nv_bfloat16*>(is_key ? params.k_norm : nullptr), is_key};
}

// Normalises and rotates one lane's part of a head: elements first .. first + 7 of both halves. The
// kLanes lanes of the head call it together. cos_sin[i * kLanes] belongs to pair first + i.
template <int kLanes>
__device__ __forceinline__ void rotate_octets(const __nv_bfloat16* source, const HeadRoute& route,
                                              const float2* cos_sin, int first,
                                              float norm_epsilon) {
  constexpr int kHalf = 8 * kLanes;
  Octet low = load_octet(source + first);
  Octet high = load_octet(source + kHalf + first);
  if (route.norm != nullptr) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += low.e[i] * low.e[i] + high.e[i] * high.e[i];
    // Other heads of the warp may have no norm, so only the head's own lanes exchange their sums.
    const uint32_t lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(lanes, sum, mask);
    const float inverse_rms = rsqrtf(sum / static_cast<float>(2 * kHalf) + norm_epsilon);
    const Octet low_gain = load_octet(route.norm + first);
    const Octet high_gain = load_octet(route.norm + kHalf + first);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      low.e[i] *= inverse_rms * low_gain.e[i];
      high.e[i] *= inverse_rms * high_gain.e[i];
    }
  }
  if (route.rotate) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 turn = cos_sin[i * kLanes];
      const float x = low.e[i];
      low.e[i] = x * turn.x - high.e[i] * turn.y;
      high.e[i] = high.e[i] * turn.x + x * turn.y;
    }
  }
  store_octet(route.destination + first, low);
  store_octet(route.destination + kHalf + first, high);
}

// Writes the cos and sin of this CTA's tokens, scaled, to cos_sin, and returns the number of
// tokens. Pair p of a token is at (p % 8) * kLanes + p / 8, so that neighbouring lanes read
// neighbours.
template <int kLanes>
__device__ __forceinline__ int compute_angles(const QkvRopeParams& params, int64_t first_token,
                                              float2* cos_sin) {
  constexpr int kHalf = 8 * kLanes;
  const int num_tokens =
      static_cast<int>(min(static_cast<int64_t>(kTokensPerCta), params.num_tokens - first_token));
  for (int i = static_cast<int>(threadIdx.x); i < num_tokens * kHalf; i += kThreads) {
    const int token = i / kHalf;
    const int pair = i % kHalf;
    const int64_t position = params.positions != nullptr
                                 ? params.positions[first_token + token]
                                 : params.first_position + first_token + token;
    const float2 turn = rotation(position, params.inv_freq[pair]);
    cos_sin[token * kHalf + pair % 8 * kLanes + pair / 8] =
        make_float2(turn.x * params.attention_factor, turn.y * params.attention_factor);
  }
  __syncthreads();
  return num_tokens;
}

// head_dim is 16 * kLanes. Each CTA takes kTokensPerCta tokens.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) qkv_rope_kernel(QkvRopeParams params) {
  constexpr int kHalf = 8 * kLanes;
  __shared__ float2 cos_sin[kTokensPerCta * kHalf];
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokensPerCta;
  const int num_tokens = compute_angles<kLanes>(params, first_token, cos_sin);
  const int part = static_cast<int>(threadIdx.x) % kLanes;
  const int heads = params.num_heads + 2 * params.num_kv_heads;
  for (int i = static_cast<int>(threadIdx.x) / kLanes; i < num_tokens * heads;
       i += kThreads / kLanes) {
    const int64_t token = first_token + i / heads;
    const int head = i % heads;
    const __nv_bfloat16* source =
        static_cast<const __nv_bfloat16*>(params.qkv) + (token * heads + head) * (2 * kHalf);
    rotate_octets<kLanes>(source, route_of(params, token, head), cos_sin + i / heads * kHalf + part,
                          part * 8, params.norm_epsilon);
  }
}

}  // namespace

cudaError_t LaunchQkvRope(const QkvRopeParams& params, cudaStream_t stream) {
  if (params.head_dim != 64 && params.head_dim != 128) return cudaErrorInvalidValue;
  if (params.num_tokens == 0) return cudaSuccess;
  const int64_t ctas = (params.num_tokens + kTokensPerCta - 1) / kTokensPerCta;
  const auto kernel = params.head_dim == 64 ? qkv_rope_kernel<4> : qkv_rope_kernel<8>;
  kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
