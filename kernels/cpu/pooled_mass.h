// The op of kernels/pooled_mass.h over fp32, plain rather than fast.
#ifndef PREFILLD_KERNELS_CPU_POOLED_MASS_H_
#define PREFILLD_KERNELS_CPU_POOLED_MASS_H_

#include "kernels/pooled_mass.h"

namespace prefilld::kernels::cpu {

void PooledMass(const PooledMassParams& params);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_POOLED_MASS_H_
