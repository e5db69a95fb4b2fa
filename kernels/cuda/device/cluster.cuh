// Clusters (sm_90): CTAs that read each other's shared memory. On older architectures, as when a
// kernel is launched without any, every CTA is a cluster of its own.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_CUH_

#include <cstdint>

#include "kernels/cuda/device/shared_address.cuh"

namespace prefilld::kernels::cuda::device {

__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// Of this CTA in its cluster.
__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// Where CTA `rank` of the cluster has what this CTA has at `own` in shared memory.
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

// The same as an address that instructions on shared memory of the cluster take (sm_90).
__device__ inline uint32_t cluster_shared_address(const void* own, int rank) {
  uint32_t other;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(shared_address(own)), "r"(rank));
  return other;
}

// __syncthreads() of the whole cluster.
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
