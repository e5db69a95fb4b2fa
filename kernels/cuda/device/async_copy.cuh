// Copies from global to shared memory that complete in the background: cp.async (sm_80 and newer).
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_ASYNC_COPY_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_ASYNC_COPY_CUH_

#include <cstdint>

namespace prefilld::kernels::cuda::device {

// Copies 16 bytes, or writes 16 zeros where `valid` is false (`source` is not read then).
__device__ __forceinline__ void copy_16_async(uint32_t destination, const void* source,
                                              bool valid) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source),
               "r"(source_bytes)
               : "memory");
}

// Makes a group of the copies that this thread has started since the last commit.
__device__ __forceinline__ void commit_async_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_async_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_ASYNC_COPY_CUH_
