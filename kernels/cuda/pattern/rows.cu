// Patterns from block mass, row by row, and what a pattern holds of it.
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/pattern/smallest_set.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMeasureThreads = 1024;

// One CTA per query block. grid: (query blocks, heads).
__global__ void __launch_bounds__(kThreads) select_rows_kernel(SelectRowsParams params) {
  using Search = SmallestSetSearch<kThreads>;
  __shared__ typename Search::Shared shared;
  const int64_t row = blockIdx.y * params.num_query_blocks + blockIdx.x;
  const int64_t diagonal = params.num_key_blocks - params.num_query_blocks + blockIdx.x;
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

// One CTA: even for a million tokens a pattern is 8 MB, and a pivot's attention over it takes some
// thousand times as long. A second launch, to clear or to merge sums, would cost more at all usual
// lengths. The mass is summed in fixed point: 48 fractional bits leave room for 2^15 rows.
__global__ void __launch_bounds__(kMeasureThreads)
    measure_pattern_kernel(MeasurePatternParams params) {
  __shared__ uint64_t warp_mass[kMeasureThreads / 32];
  __shared__ uint64_t warp_blocks[kMeasureThreads / 32];
  const int num_words = static_cast<int>((params.num_key_blocks + 31) / 32);
  const int64_t last_row_word = (params.num_query_blocks - 1) * num_words;
  uint64_t mass = 0;
  uint64_t blocks = 0;
  for (int64_t i = threadIdx.x; i < params.num_query_blocks * num_words; i += kMeasureThreads) {
    uint32_t word = params.pattern[i];
    if (params.last_row != nullptr && i >= last_row_word)
      word |= params.last_row[i - last_row_word];
    blocks += __popc(word);
    if (params.block_mass == nullptr) continue;
    const float* word_mass =
        params.block_mass + i / num_words * params.num_key_blocks + i % num_words * 32;
    while (word != 0) {
      mass += to_fixed(word_mass[__ffs(static_cast<int>(word)) - 1]) >> 4;
      word &= word - 1;
    }
  }
  mass = device::warp_sum(mass);
  blocks = device::warp_sum(blocks);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) {
    warp_mass[warp] = mass;
    warp_blocks[warp] = blocks;
  }
  __syncthreads();
  if (warp != 0) return;
  static_assert(kMeasureThreads / 32 == 32, "one warp adds up the warps' sums");
  mass = device::warp_sum(warp_mass[lane]);
  blocks = device::warp_sum(warp_blocks[lane]);
  if (lane != 0) return;
  *params.blocks = static_cast<int64_t>(blocks);
  if (params.block_mass != nullptr) {
    *params.mass =
        static_cast<double>(mass) * 0x1p-48 / static_cast<double>(params.num_query_blocks);
  }
}

}  // namespace

cudaError_t LaunchSelectRows(const SelectRowsParams& params, cudaStream_t stream) {
  if (params.num_query_blocks <= 0 || params.num_heads <= 0) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(params.num_query_blocks),
                  static_cast<unsigned>(params.num_heads));
  select_rows_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchMeasurePattern(const MeasurePatternParams& params, cudaStream_t stream) {
  if (params.num_query_blocks <= 0) return cudaErrorInvalidValue;
  measure_pattern_kernel<<<1, kMeasureThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
