// Antidiagonal scores by mma.sync, for every GPU from sm_80 on; the op's contract is
// kernels/antidiagonal_scores.h.
#ifndef PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SM80_SCORES_H_
#define PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SM80_SCORES_H_

#include <cuda_runtime_api.h>

#include "kernels/antidiagonal_scores.h"
#include "kernels/cuda/antidiagonal/plan.h"

namespace prefilld::kernels::cuda::sm80 {

// Computes the heads of `launch`, whose tiles and items are not set yet. The caller has checked the
// shape.
cudaError_t LaunchAntidiagonalScores(const AntidiagonalScoresParams& params, FoldLaunch launch,
                                     int num_sms, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm80

#endif  // PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_SM80_SCORES_H_
