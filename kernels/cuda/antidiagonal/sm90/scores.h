// Antidiagonal scores on Hopper GPUs: wgmma on tiles that bulk tensor copies bring, warps
// specialised in copying or computing, CTAs that persist. The op's contract is
// kernels/antidiagonal_scores.h.
#ifndef PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SM90_SCORES_H_
#define PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SM90_SCORES_H_

#include <cuda_runtime_api.h>

#include "kernels/antidiagonal_scores.h"
#include "kernels/cuda/antidiagonal/plan.h"

namespace prefilld::kernels::cuda::sm90 {

// Whether the kernels are built for this shape: blocks of 8 or 16 folds. It says nothing about the
// GPU.
bool Supports(const AntidiagonalScoresParams& params);

// Computes the heads of `launch`, whose tiles and items are not set yet.
cudaError_t LaunchAntidiagonalScores(const AntidiagonalScoresParams& params, FoldLaunch launch,
                                     int num_sms, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SM90_SCORES_H_
