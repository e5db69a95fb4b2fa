// The choice of kernels by GPU.
//
// Attention, the estimate, antidiagonal scores and the gated linear layer have kernels for two
// kinds of GPU, in folders named after the oldest architecture that runs them: sm80 for every GPU
// from Ampere on, sm90 for Hopper alone. A launcher takes those of sm90 where the GPU is a Hopper
// and they are built for the shape, else the portable ones.
#ifndef PREFILLD_KERNELS_CUDA_KERNEL_PATH_H_
#define PREFILLD_KERNELS_CUDA_KERNEL_PATH_H_

#include <cuda_runtime_api.h>

#include <optional>

namespace prefilld::kernels::cuda {

// The kernels that a caller asks for: the fastest kernels that can compute the call, or one kind of
// them, for tests and comparisons.
enum class KernelPath { kFastest, kPortable, kHopper };

struct GpuTraits {
  int num_sms = 0;           // multiprocessors
  int compute_major = 0;     // first number of the compute capability
  int max_shared_bytes = 0;  // dynamic shared memory that one CTA can have

  // wgmma exists on compute capability 9 alone, neither before nor after.
  constexpr bool is_hopper() const { return compute_major == 9; }
};

// Chooses kPortable or kHopper for a call. `hopper_computes` says whether the kernels of sm90 are
// built for the call's shape. Returns nothing where kHopper is asked for, but not possible.
constexpr std::optional<KernelPath> ChoosePath(KernelPath asked, const GpuTraits& gpu,
                                               bool hopper_computes) {
  if (asked != KernelPath::kPortable && gpu.is_hopper() && hopper_computes) {
    return KernelPath::kHopper;
  }
  if (asked == KernelPath::kHopper) return std::nullopt;
  return KernelPath::kPortable;
}

// The traits of the calling thread's current device. The driver is asked once per device; after
// that the call is cheap. Any thread may call it.
cudaError_t CurrentGpu(GpuTraits* gpu);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_KERNEL_PATH_H_
