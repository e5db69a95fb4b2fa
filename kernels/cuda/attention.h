// Attention on CUDA; the ops' contract is kernels/attention.h.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels::cuda {

// Which kernels run: on Hopper GPUs those of attention/sm90, where they are built for the shape
// (block_tokens 128), else and on all other GPUs those of attention/sm80. kPortable insists on the
// latter, for comparison.
enum class AttentionPath { kFastest, kPortable };

// Device memory that LaunchAttention needs on the current device; may be 0.
int64_t AttentionScratchBytes(const AttentionParams& params,
                              AttentionPath path = AttentionPath::kFastest);

// The same for any work on the heads of this shape, with or without block mass. Not less than a
// shorter prompt needs.
int64_t MaxAttentionScratchBytes(const AttentionParams& shape, bool block_mass);

// `scratch` is used until the launched kernels have finished. cudaErrorInvalidValue: a shape that
// no kernel is built for (head_dim 64 or 128; block_tokens 64 or 128), block mass asked of a head
// with a pattern, or scratch missing.
cudaError_t LaunchAttention(const AttentionParams& params, void* scratch, cudaStream_t stream,
                            AttentionPath path = AttentionPath::kFastest);

// head_dim 64 or 128.
cudaError_t LaunchPagedAttention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_H_
