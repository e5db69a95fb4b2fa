// A head's own pattern: the blocks that antidiagonal scores of all queries choose, together with
// the columns and diagonals that the last queries look at.
//
// Scores are averages over folds, which hide single keys; the last queries do not see what queries
// before them look for. Each finds what the other misses, so a head takes both, and block 0 and the
// diagonal.
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
// (SharingWorkspace::OwnBlocksSlot). `heads` are ascending. Rows are those of
// the queries of `attention`. Uses scratch.block_mass; heads are taken in groups as large as that
// holds, and of long prompts in smaller ones with a pause behind each.
absl::Status AddScoredBlocks(SharingWorkspace& scratch, const kernels::AttentionParams& attention,
                             absl::Span<const ScoredHead> heads, const AttentionOptions& options);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_SCORED_PATTERNS_H_
