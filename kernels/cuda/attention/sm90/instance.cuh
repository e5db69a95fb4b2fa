// Launches one variant of the kernel.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCE_CUH_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCE_CUH_

#include "kernels/cuda/attention/sm90/forward.cuh"
#include "kernels/cuda/attention/sm90/instances.h"

namespace prefilld::kernels::cuda::sm90 {

template <int kHeadDim, bool kBlockMass>
cudaError_t Run(const Launch& launch, const TensorMaps& maps, int grid, cudaStream_t stream) {
  auto kernel = attention_kernel<kHeadDim, kBlockMass>;
  constexpr int kSharedBytes = sizeof(SharedStorage<kHeadDim>);
  static_assert(kSharedBytes <= 227 * 1024, "an SM has 227 KiB of shared memory for one block");
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  kernel<<<grid, kThreads, kSharedBytes, stream>>>(launch, maps.q, maps.k, maps.v, maps.out,
                                                   maps.first_out);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCE_CUH_
