// The layer ops and KV packing again, in the plainest form: fp32 in host memory, computed in double
// precision.
#ifndef PREFILLD_TESTS_KERNELS_REFERENCE_LAYER_OPS_H_
#define PREFILLD_TESTS_KERNELS_REFERENCE_LAYER_OPS_H_

#include "kernels/kv_pack.h"
#include "kernels/layer_ops.h"

namespace prefilld::kernels::reference {

void Embedding(const EmbeddingParams& params);
void RmsNorm(const RmsNormParams& params);
void Linear(const LinearParams& params);
void QkvRope(const QkvRopeParams& params);
void SwiGlu(const SwiGluParams& params);
void GatedLinear(const GatedLinearParams& params);  // gate_up is not used
void TokenLogprobs(const TokenLogprobsParams& params);
void PackKv(const PackKvParams& params);

// Rounds to nearest even. A NaN stays a NaN.
uint16_t ToBf16(float x);
uint16_t ToFp16(float x);

}  // namespace prefilld::kernels::reference

#endif  // PREFILLD_TESTS_KERNELS_REFERENCE_LAYER_OPS_H_
