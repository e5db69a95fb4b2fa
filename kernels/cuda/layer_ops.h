// The ops of a decoder layer on CUDA, except linear layers (linear.h, gated_linear.h); their
// contract is kernels/layer_ops.h. Tensors are aligned to 16 bytes. hidden and intermediate are
// multiples of 8, so that rows are aligned too; otherwise the launchers return
// cudaErrorInvalidValue.
#ifndef PREFILLD_KERNELS_CUDA_LAYER_OPS_H_
#define PREFILLD_KERNELS_CUDA_LAYER_OPS_H_

#include <cuda_runtime_api.h>

#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda {

cudaError_t LaunchEmbedding(const EmbeddingParams& params, cudaStream_t stream);
cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);
cudaError_t LaunchSwiGlu(const SwiGluParams& params, cudaStream_t stream);
// vocab_size may be any number.
cudaError_t LaunchTokenLogprobs(const TokenLogprobsParams& params, cudaStream_t stream);

// head_dim is 64 or 128; strides are multiples of 8.
cudaError_t LaunchQkvRope(const QkvRopeParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_LAYER_OPS_H_
