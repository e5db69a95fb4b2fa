#include "kernels/cuda/attention/sm90/instance.cuh"

namespace prefilld::kernels::cuda::sm90 {

cudaError_t RunHeadDim64(const Launch& launch, const TensorMaps& maps, int grid,
                         cudaStream_t stream) {
  return Run<64, false>(launch, maps, grid, stream);
}

}  // namespace prefilld::kernels::cuda::sm90
