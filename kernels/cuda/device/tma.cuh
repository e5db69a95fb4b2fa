// Bulk tensor copies between global and shared memory (sm_90).
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_TMA_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_TMA_CUH_

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/device/shared_address.cuh"

namespace prefilld::kernels::cuda::device {

// Loads the box at these coordinates, c0 being the innermost. Elements outside the tensor arrive as
// zero; coordinates may be negative.
__device__ inline void tma_load_3d(void* dst, const CUtensorMap* map, uint64_t* barrier, int c0,
                                   int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Does the same as tma_load_3d for every CTA of the cluster whose bit is set in `ctas`: the box
// goes to the same place in each CTA's shared memory, and the barrier at the same place there
// counts it.
__device__ inline void tma_load_3d_multicast(void* dst, const CUtensorMap* map, uint64_t* barrier,
                                             uint16_t ctas, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(barrier)), "h"(ctas), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Does the same as tma_load_3d, for a tensor of four dimensions.
__device__ inline void tma_load_4d(void* dst, const CUtensorMap* map, uint64_t* barrier, int c0,
                                   int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Loads `bytes` contiguous bytes. Their number and both addresses are multiples of 16.
__device__ inline void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(dst)),
      "l"(src), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Stores a box at these coordinates, c0 being the innermost. Elements outside the tensor are not
// written.
__device__ inline void tma_store_3d(const CUtensorMap* map, const void* src, int c0, int c1,
                                    int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(src)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Makes a group of the stores issued since the last commit.
__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;"); }

// Waits until the committed stores have read their shared memory.
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before later bulk copies and matrix
// instructions, which do not see them otherwise.
__device__ inline void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_TMA_CUH_
