// Clusters (sm_90): groups of CTAs that can read each other's shared memory. Every CTA is a cluster
// of its own on older architectures, and where a kernel is launched without clusters.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_CUH_

#include <cstdint>

#include "kernels/cuda/device/shared_address.cuh"

namespace prefilld::kernels::cuda::device {

// The number of CTAs of this CTA's cluster.
__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// The number of this CTA within its cluster.
__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// The address in the shared memory of CTA `rank` that corresponds to `own` in this CTA's.
template <typename T>
__device__ inline const T* cluster_shared(const T* own, int rank) {
#if __CUDA_ARCH__ >= 900
  const T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
  return other;
#else
  return own;
#endif
}

// The same address in the form that instructions on the cluster's shared memory take (sm_90).
__device__ inline uint32_t cluster_shared_address(const void* own, int rank) {
  uint32_t other;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(shared_address(own)), "r"(rank));
  return other;
}

// Waits for all threads of the cluster, as __syncthreads() does for those of a CTA.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  if (cluster_size() > 1) {
    asm volatile("barrier.cluster.arrive;" ::: "memory");
    asm volatile("barrier.cluster.wait;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_CUH_
