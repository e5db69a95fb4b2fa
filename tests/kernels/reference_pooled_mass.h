// The pooled-mass op once more, in the plainest form: fp32 host memory, double precision inside.
#ifndef PREFILLD_TESTS_KERNELS_REFERENCE_POOLED_MASS_H_
#define PREFILLD_TESTS_KERNELS_REFERENCE_POOLED_MASS_H_

#include "kernels/pooled_mass.h"

namespace prefilld::kernels::reference {

// Uses no scratch.
void PooledMass(const PooledMassParams& params);

}  // namespace prefilld::kernels::reference

#endif  // PREFILLD_TESTS_KERNELS_REFERENCE_POOLED_MASS_H_
