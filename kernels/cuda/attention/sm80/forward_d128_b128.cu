#include "kernels/cuda/attention/sm80/forward.cuh"

namespace prefilld::kernels::cuda::sm80 {

template cudaError_t LaunchForward<Config<128, 128, false>>(const KernelParams&, int64_t,
                                                            cudaStream_t);
template cudaError_t LaunchForward<Config<128, 128, true>>(const KernelParams&, int64_t,
                                                           cudaStream_t);

}  // namespace prefilld::kernels::cuda::sm80
