// The op of kernels/antidiagonal_scores.h over fp32.
#ifndef PREFILLD_KERNELS_CPU_ANTIDIAGONAL_SCORES_H_
#define PREFILLD_KERNELS_CPU_ANTIDIAGONAL_SCORES_H_

#include "kernels/antidiagonal_scores.h"

namespace prefilld::kernels::cpu {

// Runs on the threads of kernels/cpu/threads.h and returns when it is done. head_dim is at most
// 256.
void AntidiagonalScores(const AntidiagonalScoresParams& params);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_ANTIDIAGONAL_SCORES_H_
