// The ops of kernels/*.h over fp32: the reference of the other devices, and the way where there is
// no GPU.
//
// An op runs on the threads of kernels/cpu/threads.h and returns when it is done. PackKv and
// PackPagedKv alone run on the calling thread, so that they can run beside the others.
#ifndef PREFILLD_KERNELS_CPU_OPS_H_
#define PREFILLD_KERNELS_CPU_OPS_H_

#include "kernels/antidiagonal_scores.h"
#include "kernels/attention.h"
#include "kernels/kv_pack.h"
#include "kernels/layer_ops.h"
#include "kernels/pattern.h"

namespace prefilld::kernels::cpu {

// The largest head_dim of attention, which must be a multiple of 16, and of antidiagonal scores.
inline constexpr int kMaxHeadDim = 256;

void Attention(const AttentionParams& params);
void PagedAttention(const PagedAttentionParams& params);

// Linear uses oneDNN, or our own dot products for a single token; the rest is our own vector code.
void Embedding(const EmbeddingParams& params);
void RmsNorm(const RmsNormParams& params);
void Linear(const LinearParams& params);
void QkvRope(const QkvRopeParams& params);
void SwiGlu(const SwiGluParams& params);
void GatedLinear(const GatedLinearParams& params);
void TokenLogprobs(const TokenLogprobsParams& params);

// The ops of patterns are plain, exact and deterministic. Members are selected by mass, then by
// lowest index. Masses are summed in that order in double precision until gamma times their total
// is reached. A mass of zero is never selected for its mass.
void Estimate(const EstimateParams& params);
void VerticalSlash(const VerticalSlashParams& params);
void ExpandVerticalSlash(const ExpandVerticalSlashParams& params);
void SelectRows(const SelectRowsParams& params);
void MeasurePattern(const MeasurePatternParams& params);
void AntidiagonalScores(const AntidiagonalScoresParams& params);
void PooledMass(const PooledMassParams& params);

void PackKv(const PackKvParams& params);

// Where the tokens of KV lie that is kept in pages. Token t is row t % page_tokens of page
// pages[t / page_tokens]; the pages of a head lie one behind another, each [page_tokens, head_dim].
struct KvPages {
  const int* pages = nullptr;  // of all tokens that are packed
  int page_tokens = 0;         // a multiple of PackKvParams::block_tokens
};

// Packs whole blocks of KV that lies in pages of host memory. k and v of `params` are page 0 of
// head 0. The blocks hold no token from num_tokens on.
void PackPagedKv(const PackKvParams& params, const KvPages& pages);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_OPS_H_
