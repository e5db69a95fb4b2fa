#include "kernels/cuda/kv_pack.h"

#include <algorithm>
#include <cstring>

namespace prefilld::kernels::cuda {
namespace {

using Bf16 = uint16_t;  // copied, never computed with

// Copies `blocks` blocks of one head of K or V, of which the first `tokens` tokens each are copied,
// to `destination`, which is the head's first element.
cudaError_t CopyBlocks(const Bf16* source, Bf16* destination, const PackKvParams& p, int64_t blocks,
                       int64_t tokens, cudaStream_t stream) {
  if (blocks == 0 || tokens == 0) return cudaSuccess;
  const PackedStrides strides = StridesOf(p);
  const auto bytes_of = [](int64_t elements) {
    return static_cast<size_t>(elements) * sizeof(Bf16);
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
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  cudaMemcpy3DParms copy = {};
  copy.srcPtr = {const_cast<Bf16*>(source), row, row, size(p.block_tokens)};
  copy.dstPtr = {destination, bytes_of(strides.token), row, size(strides.block / strides.token)};
  copy.extent = {row, size(tokens), size(blocks)};
  copy.kind = cudaMemcpyDeviceToHost;
  return cudaMemcpy3DAsync(&copy, stream);
}

// Zeroes the tokens [first, last) of one head; the first token of the call is token 0.
void ZeroHead(Bf16* destination, const PackKvParams& p, int64_t first, int64_t last) {
  const PackedStrides strides = StridesOf(p);
  for (int64_t token = first; token < last; ++token) {
    std::memset(destination + token / p.block_tokens * strides.block +
                    token % p.block_tokens * strides.token,
                0, static_cast<size_t>(p.head_dim) * sizeof(Bf16));
  }
}

// Returns how many of the tokens of the blocks the sequence has.
int64_t PresentTokens(const PackKvParams& p) {
  return std::clamp<int64_t>(p.num_tokens - p.first_block * p.block_tokens, 0,
                             p.num_blocks * p.block_tokens);
}

// Returns K's or V's first element of the blocks, of one head of the range.
const Bf16* HeadOf(const PackKvParams& p, const void* tensor, int head) {
  return static_cast<const Bf16*>(tensor) + (p.first_head + head) * p.kv_head_stride +
         p.first_block * p.block_tokens * p.head_dim;
}

}  // namespace

cudaError_t CopyKvToHost(const PackKvParams& p, cudaStream_t stream) {
  if (p.dst_dtype != DType::kBf16 || p.scales != KvScales::kNone) return cudaErrorInvalidValue;
  const PackedStrides strides = StridesOf(p);
  const int64_t wanted = p.num_blocks * p.block_tokens;
  const int64_t present = PresentTokens(p);
  const int64_t whole = present / p.block_tokens;  // blocks
  auto* tensor = static_cast<Bf16*>(p.dst);
  for (const void* from : {p.k, p.v}) {
    for (int head = 0; head < p.num_heads; ++head) {
      const Bf16* source = HeadOf(p, from, head);
      Bf16* destination = tensor + head * strides.head;
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

int64_t SourceBytes(const PackKvParams& p) {
  return 2 * p.num_heads * PresentTokens(p) * p.head_dim * static_cast<int64_t>(sizeof(Bf16));
}

cudaError_t CopySourceToHost(const PackKvParams& p, void* source, cudaStream_t stream) {
  const int64_t elements = PresentTokens(p) * p.head_dim;  // of a head
  if (elements == 0) return cudaSuccess;
  auto* to = static_cast<Bf16*>(source);
  for (const void* from : {p.k, p.v}) {
    for (int head = 0; head < p.num_heads; ++head, to += elements) {
      const cudaError_t error =
          cudaMemcpyAsync(to, HeadOf(p, from, head), static_cast<size_t>(elements) * sizeof(Bf16),
                          cudaMemcpyDeviceToHost, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

PackKvParams FromSource(const PackKvParams& params, const void* source) {
  PackKvParams p = params;
  p.num_tokens = PresentTokens(params);
  p.kv_head_stride = p.num_tokens * p.head_dim;
  p.k = source;
  p.v = static_cast<const Bf16*>(source) + p.num_heads * p.kv_head_stride;
  p.first_block = 0;
  p.first_head = 0;
  p.src_dtype = DType::kBf16;
  return p;
}

}  // namespace prefilld::kernels::cuda
