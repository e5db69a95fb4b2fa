// Chooses patterns from block mass, row by row, and measures how much of it a pattern holds.
#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/pattern/smallest_set.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxMeasureCtas = 256;  // enough to read from memory at full speed
constexpr int64_t kMeasureWordsPerCta = 64;

// Chooses the blocks of one row of a pattern. One CTA per query block; grid: (query blocks, heads).
__global__ void __launch_bounds__(kThreads) select_rows_kernel(SelectRowsParams params) {
  using Search = SmallestSetSearch<kThreads, /*kCopies=*/8>;
  __shared__ typename Search::Shared shared;
  __shared__ unsigned num_chosen;
  if (threadIdx.x == 0) num_chosen = 0;  // the search has barriers between this and the additions
  const int64_t row = blockIdx.y * params.num_query_blocks + blockIdx.x;
  const auto diagonal =
      static_cast<int>(params.num_key_blocks - params.num_query_blocks + blockIdx.x);
  const float* mass = params.block_mass + row * params.num_key_blocks;
  const SmallestSet set = Search(shared).find({.values = mass, .n = diagonal + 1}, params.gamma, 0);

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_words = static_cast<int>((params.num_key_blocks + 31) / 32);
  uint32_t* words = params.pattern + row * num_words;
  for (int w = static_cast<int>(threadIdx.x) / 32; w < num_words; w += kThreads / 32) {
    const int block = w * 32 + lane;
    const bool chosen =
        block <= diagonal && (block == 0 || block == diagonal || set.contains(mass[block], block));
    uint32_t word = __ballot_sync(0xffffffffu, chosen);
    if (lane != 0) continue;
    if (params.join) word |= words[w];
    words[w] = word;
    if (params.blocks != nullptr) atomicAdd(&num_chosen, static_cast<unsigned>(__popc(word)));
  }
  if (params.blocks == nullptr) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.blocks + blockIdx.y),
              static_cast<unsigned long long>(num_chosen));
  }
}

// Sums up a pattern's blocks and the mass on them. A warp takes a word of the pattern at a time,
// each lane one block, so that memory is read in order. The mass is summed in fixed point with 48
// fractional bits, which leaves room for 2^15 rows. So the result does not depend on the order in
// which CTAs add their sums to the memory of the results, which is zero at first. The upper 16 bits
// of the sum of blocks count the CTAs that have added theirs; the last one turns the sums into
// results.
__global__ void __launch_bounds__(kThreads) measure_pattern_kernel(MeasurePatternParams params) {
  constexpr int kWarps = kThreads / 32;
  constexpr unsigned long long kArrival = 1ull << 48;
  __shared__ unsigned long long warp_mass[kWarps];
  __shared__ unsigned long long warp_blocks[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_words = static_cast<int>((params.num_key_blocks + 31) / 32);
  const int64_t last_row_word = (params.num_query_blocks - 1) * num_words;
  unsigned long long mass = 0;
  unsigned long long blocks = 0;  // the same in all lanes
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
#pragma unroll 4  // several loads in flight
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
       i < params.num_query_blocks * num_words; i += stride) {
    uint32_t word = params.pattern[i];
    if (params.last_row != nullptr && i >= last_row_word)
      word |= params.last_row[i - last_row_word];
    blocks += __popc(word);
    if (params.block_mass == nullptr || (word >> lane & 1) == 0) continue;
    mass +=
        to_fixed(
            params.block_mass[i / num_words * params.num_key_blocks + i % num_words * 32 + lane]) >>
        4;
  }
  mass = device::warp_sum(mass);
  if (lane == 0) {
    warp_mass[warp] = mass;
    warp_blocks[warp] = blocks;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) {
    mass += warp_mass[w];
    blocks += warp_blocks[w];
  }
  if (gridDim.x > 1) {
    auto* all_mass = reinterpret_cast<unsigned long long*>(params.mass);
    auto* all_blocks = reinterpret_cast<unsigned long long*>(params.blocks);
    if (all_mass != nullptr) atomicAdd(all_mass, mass);
    __threadfence();  // the mass is added before this CTA is counted
    const unsigned long long before = atomicAdd(all_blocks, blocks + kArrival);
    if (before / kArrival + 1 < gridDim.x) return;
    blocks += before % kArrival;
    __threadfence();
    if (all_mass != nullptr) mass = atomicAdd(all_mass, 0ull);
  }
  *params.blocks = static_cast<int64_t>(blocks);
  if (params.block_mass != nullptr) {
    *params.mass =
        static_cast<double>(mass) * 0x1p-48 / static_cast<double>(params.num_query_blocks);
  }
}

}  // namespace

cudaError_t LaunchSelectRows(const SelectRowsParams& params, cudaStream_t stream) {
  if (params.num_query_blocks <= 0 || params.num_heads <= 0) return cudaErrorInvalidValue;
  if (params.blocks != nullptr) {
    const cudaError_t error = cudaMemsetAsync(
        params.blocks, 0, static_cast<size_t>(params.num_heads) * sizeof(*params.blocks), stream);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(params.num_query_blocks),
                  static_cast<unsigned>(params.num_heads));
  select_rows_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchMeasurePattern(const MeasurePatternParams& params, cudaStream_t stream) {
  if (params.num_query_blocks <= 0) return cudaErrorInvalidValue;
  const int64_t words = params.num_query_blocks * PatternWords(params.num_key_blocks);
  const int64_t ctas = std::min(kMaxMeasureCtas, CeilDiv(words, kMeasureWordsPerCta));
  if (ctas > 1) {
    cudaError_t error = cudaMemsetAsync(params.blocks, 0, sizeof(*params.blocks), stream);
    if (error == cudaSuccess && params.mass != nullptr) {
      error = cudaMemsetAsync(params.mass, 0, sizeof(*params.mass), stream);
    }
    if (error != cudaSuccess) return error;
  }
  measure_pattern_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
