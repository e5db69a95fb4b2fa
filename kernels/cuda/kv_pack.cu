#include "kernels/cuda/kv_pack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/device/arithmetic.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Converts eight elements from bf16 to the wire's type and stores them.
__device__ __forceinline__ void store_eight(void* dst, int64_t element, uint4 source, DType dtype) {
  const uint32_t pairs[4] = {source.x, source.y, source.z, source.w};
  if (dtype == DType::kBf16) {
    *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(dst) + element) = source;
    return;
  }
  if (dtype == DType::kFp16) {
    uint32_t halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 pair = __float22half2_rn(device::unpack_bf16(pairs[i]));
      halves[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(static_cast<__half*>(dst) + element) =
        make_uint4(halves[0], halves[1], halves[2], halves[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float2 low = device::unpack_bf16(pairs[i]);
    const float2 high = device::unpack_bf16(pairs[i + 1]);
    *reinterpret_cast<float4*>(static_cast<float*>(dst) + element + 2 * i) =
        make_float4(low.x, low.y, high.x, high.y);
  }
}

// Packs one block of K or V per CTA; its threads walk the destination in order. grid: (blocks of
// the call, K or V).
__global__ void __launch_bounds__(kThreads) pack_kv_kernel(PackKvParams params) {
  const __nv_bfloat16* source =
      static_cast<const __nv_bfloat16*>(blockIdx.y == 0 ? params.k : params.v);
  const int64_t first_token =
      (params.first_block + static_cast<int64_t>(blockIdx.x)) * params.block_tokens;
  const int block_elements = params.block_tokens * params.num_heads * params.head_dim;
  const int64_t first_element =
      (static_cast<int64_t>(blockIdx.y) * params.num_blocks + blockIdx.x) * block_elements;
  const int chunks = params.head_dim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < block_elements / 8; i += kThreads) {
    const int row = i / chunks;
    const int head =
        params.order == KvOrder::kNhd ? row % params.num_heads : row / params.block_tokens;
    const int in_block =
        params.order == KvOrder::kNhd ? row / params.num_heads : row % params.block_tokens;
    const int64_t token = first_token + in_block;
    uint4 eight = make_uint4(0, 0, 0, 0);
    if (token < params.num_tokens) {
      eight = *reinterpret_cast<const uint4*>(source +
                                              (params.first_head + head) * params.kv_head_stride +
                                              token * params.head_dim + i % chunks * 8);
    }
    store_eight(params.dst, first_element + static_cast<int64_t>(i) * 8, eight, params.dst_dtype);
  }
}

// The places of one head's elements within its half, K or V, of params.dst. They form runs.
struct HeadRuns {
  int64_t first;  // the element at which the head's first token begins
  int64_t run;    // tokens of a run
  int64_t pitch;  // elements from the start of a run to that of the next
};

HeadRuns RunsOf(const PackKvParams& p, int head) {
  const int64_t dim = p.head_dim;
  if (p.order == KvOrder::kNhd) return {head * dim, 1, p.num_heads * dim};
  return {head * p.block_tokens * dim, p.block_tokens, p.num_heads * p.block_tokens * dim};
}

// Copies `tokens` tokens of one head to `destination`, which is the head's first element.
cudaError_t CopyHead(const __nv_bfloat16* source, __nv_bfloat16* destination, const HeadRuns& runs,
                     int64_t tokens, int head_dim, cudaStream_t stream) {
  const auto token_bytes = static_cast<size_t>(head_dim) * sizeof(__nv_bfloat16);
  const int64_t whole = tokens / runs.run;
  const int64_t rest = tokens % runs.run;
  const size_t run_bytes = static_cast<size_t>(runs.run) * token_bytes;
  if (whole > 0) {
    const cudaError_t error = cudaMemcpy2DAsync(
        destination, static_cast<size_t>(runs.pitch) * sizeof(__nv_bfloat16), source, run_bytes,
        run_bytes, static_cast<size_t>(whole), cudaMemcpyDeviceToHost, stream);
    if (error != cudaSuccess) return error;
  }
  if (rest == 0) return cudaSuccess;
  return cudaMemcpyAsync(destination + whole * runs.pitch, source + whole * runs.run * head_dim,
                         static_cast<size_t>(rest) * token_bytes, cudaMemcpyDeviceToHost, stream);
}

// Zeroes the tokens [first, last) of one head.
void ZeroHead(__nv_bfloat16* destination, const HeadRuns& runs, int64_t first, int64_t last,
              int head_dim) {
  for (int64_t token = first; token < last; ++token) {
    std::memset(destination + token / runs.run * runs.pitch + token % runs.run * head_dim, 0,
                static_cast<size_t>(head_dim) * sizeof(__nv_bfloat16));
  }
}

}  // namespace

cudaError_t CopyKvToHost(const PackKvParams& p, cudaStream_t stream) {
  if (p.dst_dtype != DType::kBf16) return cudaErrorInvalidValue;
  const int64_t wanted = p.num_blocks * p.block_tokens;
  const int64_t first_token = p.first_block * p.block_tokens;
  const int64_t present = std::clamp<int64_t>(p.num_tokens - first_token, 0, wanted);
  auto* half = static_cast<__nv_bfloat16*>(p.dst);
  for (const void* tensor : {p.k, p.v}) {
    for (int head = 0; head < p.num_heads; ++head) {
      const HeadRuns runs = RunsOf(p, head);
      const auto* source = static_cast<const __nv_bfloat16*>(tensor) +
                           (p.first_head + head) * p.kv_head_stride + first_token * p.head_dim;
      const cudaError_t error =
          CopyHead(source, half + runs.first, runs, present, p.head_dim, stream);
      if (error != cudaSuccess) return error;
      ZeroHead(half + runs.first, runs, present, wanted, p.head_dim);
    }
    half += wanted * p.num_heads * p.head_dim;
  }
  return cudaSuccess;
}

cudaError_t LaunchPackKv(const PackKvParams& params, cudaStream_t stream) {
  if (params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (params.num_blocks == 0) return cudaSuccess;
  pack_kv_kernel<<<dim3(static_cast<unsigned>(params.num_blocks), 2), kThreads, 0, stream>>>(
      params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
