// The ops of kernels/attention.h over fp32. head_dim is a multiple of 16, at most kMaxHeadDim.
//
// The ops run on the threads of kernels/cpu/threads.h and return when they are done.
#ifndef PREFILLD_KERNELS_CPU_ATTENTION_H_
#define PREFILLD_KERNELS_CPU_ATTENTION_H_

#include "kernels/attention.h"

namespace prefilld::kernels::cpu {

inline constexpr int kMaxHeadDim = 256;

void Attention(const AttentionParams& params);
void PagedAttention(const PagedAttentionParams& params);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_ATTENTION_H_
