// The pooled-mass op again, in the plainest form: fp32 in host memory, computed in double
// precision.
#ifndef PREFILLD_TESTS_KERNELS_REFERENCE_POOLED_MASS_H_
#define PREFILLD_TESTS_KERNELS_REFERENCE_POOLED_MASS_H_

#include "kernels/pooled_mass.h"

namespace prefilld::kernels::reference {

// Does not use the scratch.
void PooledMass(const PooledMassParams& params);

}  // namespace prefilld::kernels::reference

#endif  // PREFILLD_TESTS_KERNELS_REFERENCE_POOLED_MASS_H_
