// Warp-level matrix instructions of sm_80 and newer. `lane` below is the thread's index in its
// warp.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_MMA_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_MMA_CUH_

#include <cstdint>

namespace prefilld::kernels::cuda::device {

// Loads four 8x8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8; register i
// then holds elements (row lane / 4, columns 2 * (lane % 4) and the next) of matrix i.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// As load_matrix_x4, each matrix transposed on the way.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&registers)[4],
                                                          uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8] in bf16 with fp32 accumulation. c[0], c[1] are row lane / 4,
// columns 2 * (lane % 4) and the next; c[2], c[3] the same columns eight rows further down.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_MMA_CUH_
