// The heavy parts of pattern sharing on CUDA; the ops' contract is kernels/pattern.h.
//
// All results are deterministic. Sums that decide what is chosen are taken in fixed point
// (pattern/smallest_set.cuh), so that they are exact and do not depend on the order of addition.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_H_
#define PREFILLD_KERNELS_CUDA_PATTERN_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/kernel_path.h"
#include "kernels/pattern.h"

namespace prefilld::kernels::cuda {

// head_dim is 64 or 128, block_tokens 64 or 128. On Hopper GPUs the kernels of pattern/sm90 compute
// block_tokens 128, those of pattern/sm80 the rest. cudaErrorInvalidValue: a shape without a
// kernel, scratch missing, or kHopper where it is not possible.
cudaError_t LaunchEstimate(const EstimateParams& params, cudaStream_t stream,
                           KernelPath path = KernelPath::kFastest);
cudaError_t LaunchVerticalSlash(const VerticalSlashParams& params, cudaStream_t stream);
cudaError_t LaunchExpandVerticalSlash(const ExpandVerticalSlashParams& params, cudaStream_t stream);
cudaError_t LaunchSelectRows(const SelectRowsParams& params, cudaStream_t stream);
cudaError_t LaunchMeasurePattern(const MeasurePatternParams& params, cudaStream_t stream);

// Serves a baseline of the evaluation alone, so it is plain rather than fast. head_dim is a
// multiple of 32, at most 256.
cudaError_t LaunchPooledMass(const PooledMassParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_H_
