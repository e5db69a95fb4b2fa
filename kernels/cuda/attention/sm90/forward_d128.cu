#include "kernels/cuda/attention/sm90/instance.cuh"

namespace prefilld::kernels::cuda::sm90 {

cudaError_t RunHeadDim128(const Launch& launch, const TensorMaps& maps, int grid,
                          cudaStream_t stream) {
  return Run<128, false>(launch, maps, grid, stream);
}

}  // namespace prefilld::kernels::cuda::sm90
