// Barriers in shared memory that wait for threads and for asynchronous copies (sm_90).
//
// A phase of a barrier ends when the expected number of threads has arrived and the expected bytes
// have been copied; then the next phase begins. The phases are of parity 0, 1, 0, 1 and so on.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_MBARRIER_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_MBARRIER_CUH_

#include <cstdint>

#include "kernels/cuda/device/shared_address.cuh"

namespace prefilld::kernels::cuda::device {

// Sets up a barrier that `arrivals` threads arrive at in each phase.
__device__ inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of copies.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of this parity has ended. A new barrier counts as having ended one of
// parity 1.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished_%=;\n"
      "bra again_%=;\n"
      "finished_%=:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Arrives at a barrier of any CTA of the cluster; `barrier` is an address from
// cluster_shared_address. It tells that CTA that reads are over. Earlier writes become visible to
// this CTA alone, which spares a fence of the whole GPU.
__device__ inline void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_MBARRIER_CUH_
