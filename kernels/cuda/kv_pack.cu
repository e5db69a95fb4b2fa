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

// Packs one block of K or V per CTA; its threads walk the destination in order, row by row of
// head_dim elements. grid: (blocks of the call, K or V).
__global__ void __launch_bounds__(kThreads)
    pack_kv_kernel(PackKvParams params, PackedStrides strides) {
  const __nv_bfloat16* source =
      static_cast<const __nv_bfloat16*>(blockIdx.y == 0 ? params.k : params.v);
  const int64_t first_token =
      (params.first_block + static_cast<int64_t>(blockIdx.x)) * params.block_tokens;
  const int64_t first_element = static_cast<int64_t>(blockIdx.y) * strides.tensor +
                                static_cast<int64_t>(blockIdx.x) * strides.block;
  const bool heads_inside = params.order == KvOrder::kNhd || params.order == KvOrder::kNh2d;
  const int chunks = params.head_dim / 8;
  const int block_chunks = params.block_tokens * params.num_heads * chunks;
  for (int i = static_cast<int>(threadIdx.x); i < block_chunks; i += kThreads) {
    const int row = i / chunks;
    const int column = i % chunks * 8;
    const int head = heads_inside ? row % params.num_heads : row / params.block_tokens;
    const int in_block = heads_inside ? row / params.num_heads : row % params.block_tokens;
    const int64_t token = first_token + in_block;
    uint4 eight = make_uint4(0, 0, 0, 0);
    if (token < params.num_tokens) {
      eight = *reinterpret_cast<const uint4*>(source +
                                              (params.first_head + head) * params.kv_head_stride +
                                              token * params.head_dim + column);
    }
    store_eight(params.dst, first_element + in_block * strides.token + head * strides.head + column,
                eight, params.dst_dtype);
  }
}

// Copies `blocks` blocks of one head of K or V, of which the first `tokens` tokens each are copied,
// to `destination`, which is the head's first element.
cudaError_t CopyBlocks(const __nv_bfloat16* source, __nv_bfloat16* destination,
                       const PackKvParams& p, int64_t blocks, int64_t tokens, cudaStream_t stream) {
  if (blocks == 0 || tokens == 0) return cudaSuccess;
  const PackedStrides strides = StridesOf(p);
  const auto bytes_of = [](int64_t elements) {
    return static_cast<size_t>(elements) * sizeof(__nv_bfloat16);
  };
  const size_t row = bytes_of(p.head_dim);
  if (p.order == KvOrder::kHnd) {  // the tokens of a block are one row
    return cudaMemcpy2DAsync(destination, bytes_of(strides.block), source,
                             bytes_of(int64_t{p.block_tokens} * p.head_dim),
                             static_cast<size_t>(tokens) * row, static_cast<size_t>(blocks),
                             cudaMemcpyDeviceToHost, stream);
  }
  if (strides.block == p.block_tokens * strides.token) {  // so are the rows of all blocks apart
    return cudaMemcpy2DAsync(destination, bytes_of(strides.token), source, row, row,
                             static_cast<size_t>((blocks - 1) * p.block_tokens + tokens),
                             cudaMemcpyDeviceToHost, stream);
  }
  cudaMemcpy3DParms copy = {};
  copy.srcPtr = make_cudaPitchedPtr(const_cast<__nv_bfloat16*>(source), row, row,
                                    static_cast<size_t>(p.block_tokens));
  copy.dstPtr = make_cudaPitchedPtr(destination, bytes_of(strides.token), row,
                                    static_cast<size_t>(strides.block / strides.token));
  copy.extent = make_cudaExtent(row, static_cast<size_t>(tokens), static_cast<size_t>(blocks));
  copy.kind = cudaMemcpyDeviceToHost;
  return cudaMemcpy3DAsync(&copy, stream);
}

// Zeroes the tokens [first, last) of one head; the first token of the call is token 0.
void ZeroHead(__nv_bfloat16* destination, const PackKvParams& p, int64_t first, int64_t last) {
  const PackedStrides strides = StridesOf(p);
  for (int64_t token = first; token < last; ++token) {
    std::memset(destination + token / p.block_tokens * strides.block +
                    token % p.block_tokens * strides.token,
                0, static_cast<size_t>(p.head_dim) * sizeof(__nv_bfloat16));
  }
}

}  // namespace

cudaError_t CopyKvToHost(const PackKvParams& p, cudaStream_t stream) {
  if (p.dst_dtype != DType::kBf16) return cudaErrorInvalidValue;
  const PackedStrides strides = StridesOf(p);
  const int64_t wanted = p.num_blocks * p.block_tokens;
  const int64_t first_token = p.first_block * p.block_tokens;
  const int64_t present = std::clamp<int64_t>(p.num_tokens - first_token, 0, wanted);
  const int64_t whole = present / p.block_tokens;  // blocks
  auto* tensor = static_cast<__nv_bfloat16*>(p.dst);
  for (const void* from : {p.k, p.v}) {
    for (int head = 0; head < p.num_heads; ++head) {
      const auto* source = static_cast<const __nv_bfloat16*>(from) +
                           (p.first_head + head) * p.kv_head_stride + first_token * p.head_dim;
      __nv_bfloat16* destination = tensor + head * strides.head;
      cudaError_t error = CopyBlocks(source, destination, p, whole, p.block_tokens, stream);
      if (error != cudaSuccess) return error;
      error =
          CopyBlocks(source + whole * p.block_tokens * p.head_dim,
                     destination + whole * strides.block, p, 1, present % p.block_tokens, stream);
      if (error != cudaSuccess) return error;
      ZeroHead(destination, p, present, wanted);
    }
    tensor += strides.tensor;
  }
  return cudaSuccess;
}

cudaError_t LaunchPackKv(const PackKvParams& params, cudaStream_t stream) {
  if (params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (params.num_blocks == 0) return cudaSuccess;
  pack_kv_kernel<<<dim3(static_cast<unsigned>(params.num_blocks), 2), kThreads, 0, stream>>>(
      params, StridesOf(params));
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
