#include "kernels/cuda/kv_pack.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Eight elements on their way from bf16 to the wire's type.
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

// grid: (blocks of the call, K or V). Threads walk the destination block in order.
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

}  // namespace

cudaError_t LaunchPackKv(const PackKvParams& params, cudaStream_t stream) {
  if (params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (params.num_blocks == 0) return cudaSuccess;
  pack_kv_kernel<<<dim3(static_cast<unsigned>(params.num_blocks), 2), kThreads, 0, stream>>>(
      params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
