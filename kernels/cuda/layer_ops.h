// The ops of a decoder layer on CUDA, except linear layers (linear.h); contract:
// kernels/layer_ops.h. Tensors are aligned to 16 bytes, and hidden and intermediate are multiples
// of 8, so that their rows are too; cudaErrorInvalidValue otherwise.
#ifndef PREFILLD_KERNELS_CUDA_LAYER_OPS_H_
#define PREFILLD_KERNELS_CUDA_LAYER_OPS_H_

#include <cuda_runtime_api.h>

#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda {

cudaError_t LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream);
cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);
cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream);
// Any vocab_size.
cudaError_t LaunchTokenLogprobs(const TokenLogprobsParams& params, cudaStream_t stream);

// head_dim 64 or 128; strides are multiples of 8.
cudaError_t LaunchQkvRope(const QkvRopeParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_LAYER_OPS_H_
