// Attention on CUDA; the ops' contract is kernels/attention.h.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels::cuda {

// Device memory that LaunchAttention needs on a GPU of `num_multiprocessors`; 0 when no head asks
// for its block mass.
int64_t AttentionScratchBytes(const AttentionParams& params, int num_multiprocessors);

// `scratch` is used until the launched kernels have finished. cudaErrorInvalidValue: a shape that
// no kernel is built for (head_dim 64 or 128; block_tokens 64 or 128), block mass asked of a head
// with a pattern, or scratch missing.
cudaError_t LaunchAttention(const AttentionParams& params, void* scratch, cudaStream_t stream);

// head_dim 64, 128 or 256.
cudaError_t LaunchPagedAttention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_H_
