// The ops of kernels/pattern.h: plain, exact and deterministic, the reference of other backends.
//
// The ops run on the threads of kernels/cpu/threads.h and return when they are done.
// Members are selected by mass, then by lowest index. Masses are summed in that order in double
// precision until gamma times their total is reached. A mass of zero is never selected for its
// mass.
#ifndef PREFILLD_KERNELS_CPU_PATTERN_H_
#define PREFILLD_KERNELS_CPU_PATTERN_H_

#include "kernels/pattern.h"

namespace prefilld::kernels::cpu {

void Estimate(const EstimateParams& params);
void VerticalSlash(const VerticalSlashParams& params);
void ExpandVerticalSlash(const ExpandVerticalSlashParams& params);
void SelectRows(const SelectRowsParams& params);
void MeasurePattern(const MeasurePatternParams& params);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_PATTERN_H_
