#ifndef PREFILLD_KERNELS_CUDA_DEVICE_SHARED_ADDRESS_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_SHARED_ADDRESS_CUH_

#include <cstdint>

namespace prefilld::kernels::cuda::device {

// The address of shared memory in the form that PTX instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_SHARED_ADDRESS_CUH_
