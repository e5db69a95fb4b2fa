// Launching kernels that take more shared memory than a CTA has by default.
#ifndef PREFILLD_KERNELS_CUDA_LAUNCH_CUH_
#define PREFILLD_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

namespace prefilld::kernels::cuda {

// The most dynamic shared memory that one CTA can have on sm_90.
inline constexpr size_t kMaxSharedBytesSm90 = 227 * 1024;

// Launches the kernel with `shared_bytes` of dynamic shared memory.
template <typename... Params>
cudaError_t LaunchKernel(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                         cudaStream_t stream, const std::type_identity_t<Params>&... params) {
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(shared_bytes));
      error != cudaSuccess) {
    return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params...);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_LAUNCH_CUH_
