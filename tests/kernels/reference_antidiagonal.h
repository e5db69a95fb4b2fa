// Antidiagonal scores again, in the plainest form: fp32 in host memory, computed in double
// precision.
#ifndef PREFILLD_TESTS_KERNELS_REFERENCE_ANTIDIAGONAL_H_
#define PREFILLD_TESTS_KERNELS_REFERENCE_ANTIDIAGONAL_H_

#include "kernels/antidiagonal_scores.h"

namespace prefilld::kernels::reference {

// Writes zeros above the diagonal.
void AntidiagonalScores(const AntidiagonalScoresParams& params);

}  // namespace prefilld::kernels::reference

#endif  // PREFILLD_TESTS_KERNELS_REFERENCE_ANTIDIAGONAL_H_
