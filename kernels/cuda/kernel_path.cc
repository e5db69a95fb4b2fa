#include "kernels/cuda/kernel_path.h"

#include <map>
#include <mutex>

namespace prefilld::kernels::cuda {
namespace {

cudaError_t Describe(int device, GpuTraits* gpu) {
  cudaError_t error = cudaDeviceGetAttribute(&gpu->num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&gpu->compute_major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&gpu->max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device);
  }
  return error;
}

}  // namespace

cudaError_t CurrentGpu(GpuTraits* gpu) {
  static std::mutex mutex;
  static std::map<int, GpuTraits> known;  // by device; a failure is not kept
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    *gpu = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = Describe(device, gpu);
  if (error == cudaSuccess) known.emplace(device, *gpu);
  return error;
}

}  // namespace prefilld::kernels::cuda
