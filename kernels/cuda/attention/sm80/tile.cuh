// Tiles of Q, K and V in shared memory, and the warp-level product Q K^T over them.
//
// A tile is [rows, head_dim] bf16 whose 16-byte chunks are swizzled: chunk c of row r is stored in
// the place of chunk c ^ (r % 8). So the eight rows that one ldmatrix step reads at equal c fall
// into eight different groups of banks.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM80_TILE_CUH_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM80_TILE_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/async_copy.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace prefilld::kernels::cuda::sm80 {

// The byte offset of a 16-byte chunk within a tile.
template <int kHeadDim>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kHeadDim * 2 + ((chunk ^ (row & 7)) * 16));
}

// Starts the copy of a tile by kThreads threads. Row r comes from source + r * row_stride; rows
// outside [first_valid, end_valid) become zero.
template <int kRows, int kHeadDim, int kThreads>
__device__ __forceinline__ void load_tile_async(uint32_t tile, const __nv_bfloat16* source,
                                                int64_t row_stride, int first_valid,
                                                int end_valid) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kRowsPerStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0, "a step of the copy covers whole rows");
  static_assert(kRows % kRowsPerStep == 0, "every step of the copy is full");
  static_assert(kRowsPerStep % 8 == 0, "all rows of a thread are swizzled alike");
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int first_row = static_cast<int>(threadIdx.x) / kChunks;
  const uint32_t destination = tile + chunk_offset<kHeadDim>(first_row, chunk);
  const __nv_bfloat16* thread_source = source + first_row * row_stride + chunk * 8;
#pragma unroll
  for (int step = 0; step < kRows / kRowsPerStep; ++step) {
    const int row = first_row + step * kRowsPerStep;
    device::copy_16_async(destination + step * kRowsPerStep * kHeadDim * 2,
                          thread_source + step * kRowsPerStep * row_stride,
                          row >= first_valid && row < end_valid);
  }
}

// The byte offset, from the row's first byte, of the chunk that a lane names when one ldmatrix
// reads chunks 2 * step and 2 * step + 1. `swizzle` is 16 * (half ^ (row % 8)), where half (0 or 1)
// is the lane's chunk of the two. The formula has only four different offsets over all steps, and
// the rest is part of the instruction.
__device__ __forceinline__ constexpr uint32_t step_offset(int step, uint32_t swizzle) {
  return (((step % 4) * 32) ^ swizzle) + (step / 4) * 128;
}

// Sets s to zero.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void clear(float (&s)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][j][e] = 0.0f;
    }
  }
}

// Adds Q K^T to s[kRowTiles * 16, kKeys] for the warp's rows, which begin at row `first_row` of
// q_tile. s[i][j] are the accumulators (device/accumulator.cuh) of row tile i and of the eight keys
// from 8j on.
template <int kHeadDim, int kRowTiles, int kKeys>
__device__ __forceinline__ void accumulate_qk(float (&s)[kRowTiles][kKeys / 8][4], uint32_t q_tile,
                                              int first_row, uint32_t k_tile) {
  constexpr int kRowBytes = kHeadDim * 2;
  const int lane = device::opaque(threadIdx.x) % 32;
  // Q fragments: lanes 0-15 name the 16 rows at the first eight columns, lanes 16-31 the same rows
  // at the next eight.
  const uint32_t q_row = q_tile + (first_row + lane % 16) * kRowBytes;
  const uint32_t q_swizzle = ((lane / 16) ^ (lane % 8)) * 16;
  // K fragments: matrices 0 and 1 are keys 0-7 at columns 0-7 and 8-15; matrices 2 and 3 are keys
  // 8-15 at the same columns.
  const uint32_t k_row = k_tile + (lane % 8 + (lane / 16) * 8) * kRowBytes;
  const uint32_t k_swizzle = (((lane / 8) % 2) ^ (lane % 8)) * 16;
  // The loop is not unrolled in full: at head_dim 128 there are no registers left for the
  // addresses.
#pragma unroll 2
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t q_fragment[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      device::load_matrix_x4(q_fragment[i],
                             q_row + i * 16 * kRowBytes + step_offset(step, q_swizzle));
    }
#pragma unroll
    for (int pair = 0; pair < kKeys / 16; ++pair) {
      uint32_t k_fragment[4];
      device::load_matrix_x4(k_fragment,
                             k_row + pair * 16 * kRowBytes + step_offset(step, k_swizzle));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        device::mma_m16n8k16(s[i][2 * pair], q_fragment[i], k_fragment[0], k_fragment[1]);
        device::mma_m16n8k16(s[i][2 * pair + 1], q_fragment[i], k_fragment[2], k_fragment[3]);
      }
    }
  }
}

// Computes s = Q K^T, as accumulate_qk adds it.
template <int kHeadDim, int kRowTiles, int kKeys>
__device__ __forceinline__ void multiply_qk(float (&s)[kRowTiles][kKeys / 8][4], uint32_t q_tile,
                                            int first_row, uint32_t k_tile) {
  clear(s);
  accumulate_qk<kHeadDim, kRowTiles, kKeys>(s, q_tile, first_row, k_tile);
}

}  // namespace prefilld::kernels::cuda::sm80

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM80_TILE_CUH_
