// The report on one layer of a prefill, for the response and the metrics.
#ifndef PREFILLD_MODEL_SPARSE_LAYER_REPORT_H_
#define PREFILLD_MODEL_SPARSE_LAYER_REPORT_H_

#include <cstdint>
#include <vector>

#include "model/sparse/recall_audit.h"

namespace prefilld::model {

// The report on one layer. Head counts add up to num_heads, or to 0 if num_queries is 1 of several
// tokens. They hold for every prompt of a batch; times are those of the whole batch.
struct LayerReport {
  int layer = 0;
  // The number of queries whose attention was computed: all tokens, padding included. In the last
  // layer of a prompt alone it is 1 whatever the policy, because only the last query is read there
  // unless logprobs were asked for.
  int64_t num_queries = 0;
  int dense_heads = 0;
  int pivot_heads = 0;
  int shared_heads = 0;          // patterns of exact pivots
  int score_sharing_heads = 0;   // scored patterns of another head
  int scored_heads = 0;          // patterns from antidiagonal scores and the last queries
  int vertical_slash_heads = 0;  // patterns from the last queries alone
  int baseline_heads = 0;        // patterns of a baseline policy
  // Computed blocks / causal blocks of these queries over all heads; exact heads count as 1.
  double density = 0.0;
  // Times by the device's clock, without what others computed at the points inside the layer.
  int64_t compute_us = 0;
  int64_t attention_us = 0;
  int64_t pattern_us = 0;  // estimate, decide, build
  // With AttentionOptions.recall_audit_rows: the recall of the heads that are not exact. audit_us
  // is part of compute_us, and of no other time.
  std::vector<HeadRecall> recall;
  int64_t audit_us = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_LAYER_REPORT_H_
