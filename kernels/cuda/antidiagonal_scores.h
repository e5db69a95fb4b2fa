// Antidiagonal scores on CUDA; the op's contract is kernels/antidiagonal_scores.h.
#ifndef PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SCORES_H_
#define PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SCORES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/antidiagonal_scores.h"
#include "kernels/cuda/kernel_path.h"

namespace prefilld::kernels::cuda {

// The bytes of device memory that LaunchAntidiagonalScores needs on the current device, whatever
// the path. Fewer keys or heads do not need more.
int64_t AntidiagonalScratchBytes(const AntidiagonalScoresParams& params);

// Computes the op. `scratch` is used until the launched kernels have finished. On Hopper GPUs
// antidiagonal/sm90 computes blocks of 8 and 16 folds, antidiagonal/sm80 the rest. Returns
// cudaErrorInvalidValue where
// - no kernel is built for the shape (head_dim is 64 or 128, block_tokens 64 or 128, stride 8 or
//   16);
// - scratch is missing;
// - kHopper is asked for, but not possible.
cudaError_t LaunchAntidiagonalScores(const AntidiagonalScoresParams& params, void* scratch,
                                     cudaStream_t stream, KernelPath path = KernelPath::kFastest);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SCORES_H_
