// The attention ops again, in the plainest form: fp32 in host memory, computed in double precision.
#ifndef PREFILLD_TESTS_KERNELS_REFERENCE_ATTENTION_H_
#define PREFILLD_TESTS_KERNELS_REFERENCE_ATTENTION_H_

#include "kernels/attention.h"

namespace prefilld::kernels::reference {

void Attention(const AttentionParams& params);
void PagedAttention(const PagedAttentionParams& params);

}  // namespace prefilld::kernels::reference

#endif  // PREFILLD_TESTS_KERNELS_REFERENCE_ATTENTION_H_
