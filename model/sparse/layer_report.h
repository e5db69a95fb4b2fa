// What one layer of a prefill did, as the response and the metrics report it.
#ifndef PREFILLD_MODEL_SPARSE_LAYER_REPORT_H_
#define PREFILLD_MODEL_SPARSE_LAYER_REPORT_H_

#include <cstdint>
#include <vector>

#include "model/sparse/recall_audit.h"

namespace prefilld::model {

// What was done for one layer. Head counts add up to num_heads, or to 0 where num_queries is 1 of
// several tokens, and are those of every prompt of a batch; times are the batch's.
struct LayerReport {
  int layer = 0;
  // Whose attention was computed: all tokens, padding included; in the last layer of a prompt alone
  // the last one, whatever the policy, as no other is read unless logprobs were asked for.
  int64_t num_queries = 0;
  int dense_heads = 0;
  int pivot_heads = 0;
  int shared_heads = 0;
  int vertical_slash_heads = 0;
  int baseline_heads = 0;  // patterns of a baseline policy
  // Computed blocks / causal blocks of these queries over all heads; exact heads count as 1.
  double density = 0.0;
  int64_t compute_us = 0;
  int64_t attention_us = 0;
  int64_t pattern_us = 0;  // estimate, decide, build
  // With AttentionOptions.recall_audit_rows: the heads that are not exact. Its time is part of
  // compute_us alone.
  std::vector<HeadRecall> recall;
  int64_t audit_us = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_LAYER_REPORT_H_
