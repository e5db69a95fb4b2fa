// Patterns from block mass, row by row, and what a pattern holds of it.
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/pattern/smallest_set.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// One CTA per query block.
__global__ void __launch_bounds__(kThreads) select_rows_kernel(SelectRowsParams params) {
  using Search = SmallestSetSearch<kThreads>;
  __shared__ typename Search::Shared shared;
  const int64_t row = blockIdx.x;
  const int64_t diagonal = params.num_key_blocks - params.num_query_blocks + row;
  const float* mass = params.block_mass + row * params.num_key_blocks;
  const SmallestSet set = Search(shared).find(mass, diagonal + 1, params.gamma, 0);

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_words = static_cast<int>((params.num_key_blocks + 31) / 32);
  uint32_t* words = params.pattern + row * num_words;
  for (int w = static_cast<int>(threadIdx.x) / 32; w < num_words; w += kThreads / 32) {
    const int64_t block = static_cast<int64_t>(w) * 32 + lane;
    const bool chosen =
        block <= diagonal && (block == 0 || block == diagonal || set.contains(mass[block], block));
    const uint32_t word = __ballot_sync(0xffffffffu, chosen);
    if (lane == 0) words[w] = word;
  }
}

// One warp per query block. The mass is summed in fixed point, in the place of the result.
__global__ void __launch_bounds__(kThreads) measure_pattern_kernel(MeasurePatternParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= params.num_query_blocks) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_words = static_cast<int>((params.num_key_blocks + 31) / 32);
  const bool last = row == params.num_query_blocks - 1 && params.last_row != nullptr;
  uint64_t mass = 0;
  uint64_t blocks = 0;
  for (int w = lane; w < num_words; w += 32) {
    uint32_t word = params.pattern[row * num_words + w];
    if (last) word |= params.last_row[w];
    blocks += __popc(word);
    if (params.block_mass == nullptr) continue;
    while (word != 0) {
      const int64_t block = static_cast<int64_t>(w) * 32 + __ffs(static_cast<int>(word)) - 1;
      word &= word - 1;
      mass += to_fixed(params.block_mass[row * params.num_key_blocks + block]) >> 4;
    }
  }
  mass = device::warp_sum(mass);
  blocks = device::warp_sum(blocks);
  if (lane != 0) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(params.blocks), blocks);
  if (params.block_mass != nullptr) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.mass), mass);
  }
}

__global__ void finish_mass_kernel(double* mass, int64_t num_query_blocks) {
  // 48 fractional bits: 2^15 rows fit.
  const auto fixed = *reinterpret_cast<const unsigned long long*>(mass);
  *mass = static_cast<double>(fixed) * 0x1p-48 / static_cast<double>(num_query_blocks);
}

}  // namespace

cudaError_t LaunchSelectRows(const SelectRowsParams& params, cudaStream_t stream) {
  if (params.num_query_blocks <= 0) return cudaErrorInvalidValue;
  select_rows_kernel<<<static_cast<unsigned>(params.num_query_blocks), kThreads, 0, stream>>>(
      params);
  return cudaGetLastError();
}

cudaError_t LaunchMeasurePattern(const MeasurePatternParams& params, cudaStream_t stream) {
  if (params.num_query_blocks <= 0) return cudaErrorInvalidValue;
  cudaError_t error = cudaMemsetAsync(params.blocks, 0, sizeof(*params.blocks), stream);
  if (error != cudaSuccess) return error;
  if (params.block_mass != nullptr) {
    error = cudaMemsetAsync(params.mass, 0, sizeof(*params.mass), stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t ctas = CeilDiv(params.num_query_blocks, kThreads / 32);
  measure_pattern_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(params);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  if (params.block_mass == nullptr) return cudaSuccess;
  finish_mass_kernel<<<1, 1, 0, stream>>>(params.mass, params.num_query_blocks);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
