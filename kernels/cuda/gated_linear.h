// Gate, up and SwiGLU on CUDA; the op's contract is kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_CUDA_GATED_LINEAR_H_
#define PREFILLD_KERNELS_CUDA_GATED_LINEAR_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/linear.h"
#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda {

// kTwoSteps: cuBLASLt's product into gate_up, then SwiGLU; on any GPU. kFused: the kernel of
// gated_linear/sm90, which leaves gate_up as it is; on Hopper. kFastest: the one that Tune found
// faster for the features, two steps where it has not tried.
enum class GatedLinearPath { kFastest, kFused, kTwoSteps };

// For use by one thread and on one stream, as LinearLauncher.
class GatedLinearLauncher {
 public:
  // `linear` is borrowed. Looks at the current device.
  explicit GatedLinearLauncher(LinearLauncher* linear);

  // CUBLAS_STATUS_NOT_SUPPORTED: kFused for a shape or on a GPU that it does not compute, or
  // intermediate is not a multiple of 8.
  cublasStatus_t Launch(const GatedLinearParams& params, cudaStream_t stream,
                        GatedLinearPath path = GatedLinearPath::kFastest);

  // Tunes the product, then times both ways; as LinearLauncher::Tune. gate_up and y are
  // overwritten.
  cublasStatus_t Tune(const GatedLinearParams& params, cudaStream_t stream);

  // Whether Launch by kFastest takes the fused kernel.
  bool IsFused(const GatedLinearParams& params) const;

 private:
  struct Tuning {
    int64_t num_tokens;
    int64_t in_features;
    int64_t intermediate;
    bool fused;
  };

  bool CanFuse(const GatedLinearParams& params) const;

  LinearLauncher* const linear_;
  int num_sms_ = 0;  // of a Hopper GPU; 0 of others
  std::vector<Tuning> tunings_;
};

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_GATED_LINEAR_H_
