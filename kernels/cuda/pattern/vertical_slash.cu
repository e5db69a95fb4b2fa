// Vertical-slash sets, and patterns from them. One CTA per head and kind of set: a head's masses
// are read a few times, from L2 after the first.
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/pattern/smallest_set.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kSelectThreads = 1024;
using Search = SmallestSetSearch<kSelectThreads, /*kCopies=*/4>;
constexpr int kExpandThreads = 256;

// grid: (heads, columns or diagonals). Dynamic shared memory: the search's, then the words of a
// row.
__global__ void __launch_bounds__(kSelectThreads)
    vertical_slash_kernel(VerticalSlashParams params, int num_key_blocks) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Search::Shared*>(memory);
  auto* words = reinterpret_cast<uint32_t*>(memory + sizeof(Search::Shared));
  const bool diagonals = blockIdx.y == 1;
  const int64_t head = blockIdx.x;
  const float* mass = (diagonals ? params.slash : params.vertical) + head * params.num_keys;
  const int num_words = (num_key_blocks + 31) / 32;
  for (int w = static_cast<int>(threadIdx.x); w < num_words; w += kSelectThreads) {
    words[w] = w == 0 ? 1u : 0u;  // column 0, or the main diagonal
  }
  const SmallestSet set =
      Search(shared).find(mass, params.num_keys, params.gamma, params.min_budget_tokens);
  __syncthreads();
  const auto choose = [&](int64_t i) {
    const int block = static_cast<int>(i / params.block_tokens);
    atomicOr(&words[block / 32], 1u << (block % 32));
    // A diagonal between two block diagonals crosses both.
    if (diagonals && i % params.block_tokens != 0 && block + 1 < num_key_blocks) {
      atomicOr(&words[(block + 1) / 32], 1u << ((block + 1) % 32));
    }
  };
  constexpr int kLoads = 8;  // in flight
  for (int64_t first = threadIdx.x; first < params.num_keys; first += kLoads * kSelectThreads) {
    float values[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t i = first + j * kSelectThreads;
      values[j] = i < params.num_keys ? mass[i] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t i = first + j * kSelectThreads;
      if (i < params.num_keys && set.contains(values[j], i)) choose(i);
    }
  }
  __syncthreads();
  uint32_t* destination = (diagonals ? params.diagonals : params.columns) + head * num_words;
  for (int w = static_cast<int>(threadIdx.x); w < num_words; w += kSelectThreads) {
    destination[w] = words[w];
  }
}

// Bits [first, first + 32) of a bitmap; bits below 0 and from 32 * num_words on are 0.
__device__ __forceinline__ uint32_t bits_from(const uint32_t* words, int num_words, int first) {
  const int word = first >> 5;  // rounds down also below 0
  const uint32_t low = word >= 0 && word < num_words ? words[word] : 0;
  const uint32_t high = word + 1 >= 0 && word + 1 < num_words ? words[word + 1] : 0;
  return __funnelshift_r(low, high, first & 31);
}

// One thread per word of a head's pattern. grid: (words, heads).
__global__ void __launch_bounds__(kExpandThreads)
    expand_vertical_slash_kernel(ExpandVerticalSlashParams params) {
  const int num_words = static_cast<int>((params.num_key_blocks + 31) / 32);
  const int64_t head = blockIdx.y;
  const uint32_t* columns = params.columns + head * num_words;
  const uint32_t* diagonals = params.diagonals + head * num_words;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kExpandThreads + threadIdx.x;
  uint32_t bits = 0;
  if (i < params.num_query_blocks * num_words) {
    const int word = static_cast<int>(i % num_words);
    const int row =
        static_cast<int>(params.num_key_blocks - params.num_query_blocks + i / num_words);
    // Key block c = 32 * word + b is diagonal row - c: the diagonals in reverse order.
    bits = columns[word] | __brev(bits_from(diagonals, num_words, row - 32 * word - 31));
    if (word == row / 32) {
      bits &= (2u << (row % 32)) - 1;
    } else if (word > row / 32) {
      bits = 0;
    }
    params.pattern[head * params.num_query_blocks * num_words + i] = bits;
  }
  if (params.blocks == nullptr) return;
  const int warp_blocks = __reduce_add_sync(0xffffffffu, __popc(bits));
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.blocks + head),
              static_cast<unsigned long long>(warp_blocks));
  }
}

}  // namespace

cudaError_t LaunchVerticalSlash(const VerticalSlashParams& params, cudaStream_t stream) {
  if (params.num_heads <= 0 || params.num_keys <= 0) return cudaErrorInvalidValue;
  const int64_t num_key_blocks = CeilDiv(params.num_keys, params.block_tokens);
  const auto shared_bytes =
      static_cast<int>(sizeof(Search::Shared) + PatternWords(num_key_blocks) * sizeof(uint32_t));
  if (cudaError_t error = cudaFuncSetAttribute(
          vertical_slash_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  vertical_slash_kernel<<<dim3(params.num_heads, 2), kSelectThreads, shared_bytes, stream>>>(
      params, static_cast<int>(num_key_blocks));
  return cudaGetLastError();
}

cudaError_t LaunchExpandVerticalSlash(const ExpandVerticalSlashParams& params,
                                      cudaStream_t stream) {
  const int64_t words = params.num_query_blocks * PatternWords(params.num_key_blocks);
  if (words <= 0 || params.num_heads <= 0) return cudaErrorInvalidValue;
  if (params.blocks != nullptr) {
    const cudaError_t error = cudaMemsetAsync(
        params.blocks, 0, static_cast<size_t>(params.num_heads) * sizeof(*params.blocks), stream);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(CeilDiv(words, kExpandThreads)),
                  static_cast<unsigned>(params.num_heads));
  expand_vertical_slash_kernel<<<grid, kExpandThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
