// Warp-level matrix instructions of sm_80 and newer; those that need sm_90 say so. `lane` below is
// the thread's index in its warp.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_MMA_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_MMA_CUH_

#include <cstdint>

#include "kernels/cuda/device/shared_address.cuh"

namespace prefilld::kernels::cuda::device {

// Loads four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix
// l / 8. Afterwards register i of a lane holds two elements of matrix i: in row lane / 4, columns
// 2 * (lane % 4) and the next.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// Does the same as load_matrix_x4, but transposes each matrix on the way.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&registers)[4],
                                                          uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// Stores four 8x8 matrices of 16-bit elements, held as load_matrix_x4 leaves them. Lane l gives the
// address of row l % 8 of matrix l / 8 (sm_90).
__device__ inline void stmatrix_x4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8] in bf16 with fp32 accumulation. device/accumulator.cuh says which
// row and column each c is.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_MMA_CUH_
