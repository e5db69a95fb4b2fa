// The op of kernels/pooled_mass.h on CUDA. It serves a baseline of the evaluation alone, so it is
// plain rather than fast.
#ifndef PREFILLD_KERNELS_CUDA_POOLED_MASS_H_
#define PREFILLD_KERNELS_CUDA_POOLED_MASS_H_

#include <cuda_runtime_api.h>

#include "kernels/pooled_mass.h"

namespace prefilld::kernels::cuda {

// head_dim is a multiple of 32, at most 256.
cudaError_t LaunchPooledMass(const PooledMassParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_POOLED_MASS_H_
