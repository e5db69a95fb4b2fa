// The compiled variants of the Hopper attention kernel, one translation unit each.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCES_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCES_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace prefilld::kernels::cuda::sm90 {

struct Launch;

struct TensorMaps {
  CUtensorMap q, k, v, out, first_out;
};

// Launches one variant with `grid` CTAs.
using Instance = cudaError_t(const Launch&, const TensorMaps&, int grid, cudaStream_t);

Instance RunHeadDim64, RunHeadDim64BlockMass, RunHeadDim128, RunHeadDim128BlockMass;

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_INSTANCES_H_
