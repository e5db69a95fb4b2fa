// The ops of kernels/ over the memory of one device.
#ifndef PREFILLD_MODEL_DEVICE_OPS_H_
#define PREFILLD_MODEL_DEVICE_OPS_H_

#include "absl/status/status.h"
#include "kernels/antidiagonal_scores.h"
#include "kernels/attention.h"
#include "kernels/layer_ops.h"
#include "kernels/pattern.h"

namespace prefilld::model {

// Ops run in the order of their calls. They may be asynchronous, and then report an error at the
// latest from the device's next Synchronize or Download. Only one thread may call them.
//
// The class is as wide as kernels/ is: each of its ops has one method here. The headers of kernels/
// say what an op computes, on which shapes and dtypes.
class Ops {
 public:
  virtual ~Ops() = default;

  // These compute a layer token by token (kernels/layer_ops.h).
  virtual absl::Status Embedding(const kernels::EmbeddingParams& params) = 0;
  virtual absl::Status RmsNorm(const kernels::RmsNormParams& params) = 0;
  virtual absl::Status Linear(const kernels::LinearParams& params) = 0;
  virtual absl::Status GatedLinear(const kernels::GatedLinearParams& params) = 0;
  virtual absl::Status QkvRope(const kernels::QkvRopeParams& params) = 0;
  virtual absl::Status TokenLogprobs(const kernels::TokenLogprobsParams& params) = 0;

  // Each tries several ways to compute products of this shape, and the op takes the fastest one
  // from then on. `x` and `w` should hold numbers like those to come; the outputs are overwritten.
  // A call may take a second or two. A device with one way only does nothing.
  virtual absl::Status TuneLinear(const kernels::LinearParams& params);
  virtual absl::Status TuneGatedLinear(const kernels::GatedLinearParams& params);

  // Computes attention (kernels/attention.h).
  virtual absl::Status Attention(const kernels::AttentionParams& params) = 0;
  virtual absl::Status PagedAttention(const kernels::PagedAttentionParams& params) = 0;
  // Allocates the scratch that Attention needs for all heads of this shape, with their block mass
  // if `block_mass` is set, so that no call up to this size allocates. Tensors and work are not
  // read. A larger call allocates when it comes.
  virtual absl::Status ReserveAttention(const kernels::AttentionParams& largest, bool block_mass);

  // Scores blocks by all queries (kernels/antidiagonal_scores.h).
  virtual absl::Status AntidiagonalScores(const kernels::AntidiagonalScoresParams& params) = 0;
  // Allocates the scratch that AntidiagonalScores needs for this shape, so that no call up to this
  // size allocates. Tensors are not read; `heads` must name heads of the shape.
  virtual absl::Status ReserveAntidiagonalScores(const kernels::AntidiagonalScoresParams& largest);

  // These build patterns (kernels/pattern.h).
  virtual absl::Status Estimate(const kernels::EstimateParams& params) = 0;
  virtual absl::Status VerticalSlash(const kernels::VerticalSlashParams& params) = 0;
  virtual absl::Status ExpandVerticalSlash(const kernels::ExpandVerticalSlashParams& params) = 0;
  virtual absl::Status SelectRows(const kernels::SelectRowsParams& params) = 0;
  virtual absl::Status MeasurePattern(const kernels::MeasurePatternParams& params) = 0;
  virtual absl::Status PooledMass(const kernels::PooledMassParams& params) = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_OPS_H_
