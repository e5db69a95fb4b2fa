// The seam between a layer and the way its attention is computed.
#ifndef PREFILLD_MODEL_SPARSE_ATTENTION_STRATEGY_H_
#define PREFILLD_MODEL_SPARSE_ATTENTION_STRATEGY_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/layer_report.h"

namespace prefilld::model {

// Computes the attention of one prompt, layer by layer. An object serves one prompt at a time and
// holds whatever the prompt's later layers need of its earlier ones. Everything that is free again
// when a layer is done lies in a workspace, which the strategies of all prompts borrow. So prompts
// may take turns layer by layer, in any order, and each gets what it would get alone.
//
// All methods belong to the thread that calls the device's ops.
class AttentionStrategy {
 public:
  virtual ~AttentionStrategy() = default;

  // Forgets the prompt before. `options` has its policy resolved.
  virtual void StartPrompt(int64_t num_tokens, const AttentionOptions& options) = 0;

  // Computes the attention of one layer; the layers of a prompt come in ascending order.
  // `attention` describes q, k, v and out without any work. On return the work is queued.
  // `report` gets what is found on the way.
  virtual absl::Status Attend(int layer, const kernels::AttentionParams& attention,
                              LayerReport* report) = 0;

  // Waits for the attention of layer report->layer and fills in head counts, density and times.
  // report->num_queries is set. Unless only_queues(), only the Attend of strategies that do may
  // come between a layer's Attend and its Report, because the figures wait in the common workspace.
  virtual absl::Status Report(LayerReport* report) = 0;

  // Says that Attend queues the same work for every prompt of one length and never waits for the
  // device. Such a layer may be recorded, and queued while the one before it is still computed.
  virtual bool only_queues() const { return false; }
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_ATTENTION_STRATEGY_H_
