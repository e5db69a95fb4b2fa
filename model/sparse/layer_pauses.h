// The seam by which whoever computes a long layer lets others go first.
#ifndef PREFILLD_MODEL_SPARSE_LAYER_PAUSES_H_
#define PREFILLD_MODEL_SPARSE_LAYER_PAUSES_H_

#include "absl/status/status.h"

namespace prefilld::model {

class LayerPauses {
 public:
  virtual ~LayerPauses() = default;

  // Is called between two parts of a layer that take long. Whatever the layer has queued so far,
  // and the scratch that it uses, stays as it is. CANCELLED: the layer must not be finished.
  virtual absl::Status Reach() = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_LAYER_PAUSES_H_
