// Gate, up and SwiGLU on CUDA; the op's contract is kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_CUDA_GATED_LINEAR_H_
#define PREFILLD_KERNELS_CUDA_GATED_LINEAR_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/kernel_path.h"
#include "kernels/cuda/launch_status.h"
#include "kernels/cuda/linear.h"
#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda {

// Computes GatedLinear in one of two ways:
// - kPortable: cuBLASLt's product into gate_up, then SwiGLU; on any GPU.
// - kHopper: the kernel of gated_linear/sm90, which fuses both and leaves gate_up as it is.
// kFastest is the one that Tune found faster for the features; kPortable where it has not tried.
//
// One thread uses it, on one stream, like LinearLauncher.
class GatedLinearLauncher {
 public:
  // `linear` is borrowed.
  explicit GatedLinearLauncher(LinearLauncher* linear) : linear_(linear) {}

  // cudaErrorInvalidValue: kHopper for a shape or on a GPU that it does not compute, or
  // intermediate is not a multiple of 8.
  LaunchStatus Launch(const GatedLinearParams& params, cudaStream_t stream,
                      KernelPath path = KernelPath::kFastest);

  // Tunes the product, as LinearLauncher::Tune does, then times both ways. gate_up and y are
  // overwritten.
  LaunchStatus Tune(const GatedLinearParams& params, cudaStream_t stream);

  // Whether Launch takes the fused kernel for kFastest.
  bool IsFused(const GatedLinearParams& params) const;

 private:
  // The outcome of a Tune.
  struct Tuning {
    int64_t num_tokens;
    int64_t in_features;
    int64_t intermediate;
    bool fused;
  };

  // Whether the fused kernel computes the params on the current device, whose traits it returns.
  bool CanFuse(const GatedLinearParams& params, GpuTraits* gpu) const;

  LinearLauncher* const linear_;
  std::vector<Tuning> tunings_;
};

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_GATED_LINEAR_H_
