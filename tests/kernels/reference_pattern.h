// The pattern ops again, in the plainest form: fp32 in host memory, computed in double precision.
#ifndef PREFILLD_TESTS_KERNELS_REFERENCE_PATTERN_H_
#define PREFILLD_TESTS_KERNELS_REFERENCE_PATTERN_H_

#include "kernels/antidiagonal_scores.h"
#include "kernels/pattern.h"

namespace prefilld::kernels::reference {

void Estimate(const EstimateParams& params);
void VerticalSlash(const VerticalSlashParams& params);
void ExpandVerticalSlash(const ExpandVerticalSlashParams& params);
void SelectRows(const SelectRowsParams& params);
void MeasurePattern(const MeasurePatternParams& params);

// Does not use the scratch.
void PooledMass(const PooledMassParams& params);

// Writes zeros above the diagonal.
void AntidiagonalScores(const AntidiagonalScoresParams& params);

}  // namespace prefilld::kernels::reference

#endif  // PREFILLD_TESTS_KERNELS_REFERENCE_PATTERN_H_
