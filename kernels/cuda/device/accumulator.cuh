// The layout of the tensor cores' accumulators, and the ways they leave the registers.
//
// mma.m16n8k16 and wgmma lay out their fp32 results alike. A warp holds 16 rows. Each thread has
// four elements of every run of eight columns: element 4 j + 2 h + e of thread `lane` is row
// 8 h + lane / 4, column 8 j + 2 (lane % 4) + e. The four lanes that share a row are called a quad.
//
// So element i is in row accumulator_row(thread) + element_row(i) and column
// accumulator_column(thread) + element_column(i). The first terms depend on the thread, the second
// ones are known to the compiler.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_ACCUMULATOR_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_ACCUMULATOR_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace prefilld::kernels::cuda::device {

// `thread` may be the lane or any count of threads that starts with a warp, signed or not.
template <typename Int>
__device__ __forceinline__ int accumulator_row(Int thread) {
  return static_cast<int>(thread % 32 / 4);
}
template <typename Int>
__device__ __forceinline__ int accumulator_column(Int thread) {
  return 2 * static_cast<int>(thread % 4);
}
__device__ __forceinline__ constexpr int element_row(int i) { return i / 2 % 2 * 8; }
__device__ __forceinline__ constexpr int element_column(int i) { return i / 4 * 8 + i % 2; }

// The maximum of a row, from each lane's maximum over its own columns; all of the quad get it.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The sum of a row, from each lane's sum over its own columns; all of the quad get it.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The sums of both rows of a quad, with two shuffles instead of four: even lanes get that of row
// lane / 4, odd lanes that of the row eight further down. `odd` says which this lane is.
__device__ __forceinline__ float quad_row_sums(const float (&x)[2], bool odd) {
  float sum = odd ? x[1] : x[0];
  // A run-time index instead of the choice would put x into local memory.
  sum += __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

// Keeps the compiler from moving uses of these registers up, before the wait for the matrix
// instructions that precedes this call: it does not know that such instructions finish late.
template <int kSize>
__device__ __forceinline__ void keep_in_order(float (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kSize>
__device__ __forceinline__ void keep_in_order(uint32_t (&x)[kSize][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSize; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// Turns 16 columns of accumulators into the bf16 operand A of the next product: `low` points to the
// four elements of the first eight columns, `high` to those of the next eight.
__device__ __forceinline__ void to_operand_a(const float* low, const float* high,
                                             uint32_t (&a)[4]) {
  a[0] = pack_bf16(low[0], low[1]);
  a[1] = pack_bf16(low[2], low[3]);
  a[2] = pack_bf16(high[0], high[1]);
  a[3] = pack_bf16(high[2], high[3]);
}

// Stores 16 columns of a warpgroup's 64 rows, in bf16 and in the order of to_operand_a, into a tile
// of 64-column chunks, each with 128-byte rows, swizzled as bulk copies expect it (wgmma.cuh). The
// columns are 16 * `step` and on; neighbouring chunks are `chunk_elements` apart. `thread` counts
// within the warpgroup (sm_90).
__device__ __forceinline__ void store_swizzled(__nv_bfloat16* tile, int chunk_elements, int thread,
                                               int step, const uint32_t (&a)[4]) {
  constexpr int kChunk = 64;
  const int lane = thread % 32;
  // Matrices 0 and 1 are rows 0-7 and 8-15 of the first eight columns, 2 and 3 the same rows of the
  // next eight. Each lane names one row of one matrix.
  const int row = thread / 32 * 16 + lane % 16;
  const int unit = step % (kChunk / 16) * 2 + lane / 16;  // 16-byte unit within the row
  stmatrix_x4(tile + step / (kChunk / 16) * chunk_elements + row * kChunk + (unit ^ (row % 8)) * 8,
              a[0], a[1], a[2], a[3]);
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_ACCUMULATOR_CUH_
