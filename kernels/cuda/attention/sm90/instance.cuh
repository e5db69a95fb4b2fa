// Launches one variant of the Hopper attention kernel.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCE_CUH_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCE_CUH_

#include "kernels/cuda/attention/sm90/forward.cuh"
#include "kernels/cuda/attention/sm90/instances.h"
#include "kernels/cuda/launch.cuh"

namespace prefilld::kernels::cuda::sm90 {

template <int kHeadDim, bool kBlockMass>
cudaError_t Run(const Launch& launch, const TensorMaps& maps, int grid, cudaStream_t stream) {
  constexpr size_t kSharedBytes = sizeof(SharedStorage<kHeadDim>);
  static_assert(kSharedBytes <= kMaxSharedBytesSm90, "the tiles fit into an SM");
  return LaunchKernel(attention_kernel<kHeadDim, kBlockMass>, grid, kThreads, kSharedBytes, stream,
                      launch, maps.q, maps.k, maps.v, maps.out, maps.first_out);
}

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCE_CUH_
