// The ops of kernels/layer_ops.h over fp32.
//
// The ops run on the threads of kernels/cpu/threads.h and return when they are done. Linear uses
// oneDNN, or our own dot products for a single token; the rest is our own vector code.
#ifndef PREFILLD_KERNELS_CPU_LAYER_OPS_H_
#define PREFILLD_KERNELS_CPU_LAYER_OPS_H_

#include "kernels/layer_ops.h"

namespace prefilld::kernels::cpu {

void Embedding(const EmbeddingParams& params);
void RmsNorm(const RmsNormParams& params);
void Linear(const LinearParams& params);
void QkvRope(const QkvRopeParams& params);
void SwiGlu(const SwiGluParams& params);
void GatedLinear(const GatedLinearParams& params);
void TokenLogprobs(const TokenLogprobsParams& params);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_LAYER_OPS_H_
