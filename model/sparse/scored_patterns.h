// A head's own pattern: the blocks that antidiagonal scores of all queries choose, together with
// the columns and diagonals that the last queries look at.
//
// Scores are averages over several tokens, so they hide single keys. The last queries do not show
// what the queries before them look for. Each finds what the other misses, so a head takes both,
// and block 0 and the diagonal.
#ifndef PREFILLD_MODEL_SPARSE_SCORED_PATTERNS_H_
#define PREFILLD_MODEL_SPARSE_SCORED_PATTERNS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/sharing_workspace.h"

namespace prefilld::model {

struct ScoredHead {
  int head = 0;
  // [num_query_blocks, W], device memory: holds what the last queries look at.
  uint32_t* pattern = nullptr;
};

// Adds to the pattern of each of these heads the smallest set of blocks of every row that holds
// options.score_threshold of the row's scores, and counts the blocks of the result
// (SharingWorkspace::OwnBlocksSlot). `heads` are ascending. There is a row for each block of
// queries of `attention`. Scores go to scratch.block_mass, so as many heads are scored at a time as
// that has room for; of long prompts fewer, with a pause behind each group.
absl::Status AddScoredBlocks(SharingWorkspace& scratch, const kernels::AttentionParams& attention,
                             absl::Span<const ScoredHead> heads, const AttentionOptions& options);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_SCORED_PATTERNS_H_
