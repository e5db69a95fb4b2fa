// The parts of a long prompt's attention, between which others may go first.
#ifndef PREFILLD_MODEL_SPARSE_ATTENTION_PARTS_H_
#define PREFILLD_MODEL_SPARSE_ATTENTION_PARTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/attention.h"
#include "model/device/device.h"
#include "model/sparse/layer_pauses.h"

namespace prefilld::model {

// Divides the attention of one layer: into groups of heads (HeadsBetweenPauses), and a group whose
// attention takes long into ranges of query blocks. Together the parts give, bit for bit, what one
// call for all of it gives. The work of a part is at most MostWorkBetweenPauses, but always enough
// to fill the device once. How much of a head with a pattern is computed is not known to the host;
// it counts for half of a dense one.
//
//   AttentionParts parts(device.traits(), pauses, attention, work);
//   while (parts.Next()) ...  // compute parts.params()
class AttentionParts {
 public:
  // `attention` describes all but the work, of which there may be none. `work` is borrowed.
  AttentionParts(const DeviceTraits& device, const LayerPauses* pauses,
                 const kernels::AttentionParams& attention,
                 absl::Span<const kernels::HeadWork> work);

  // Goes on to the next part. Returns false when there is none.
  bool Next();

  // These describe the part. The parameters point into this object, and into `work`.
  const kernels::AttentionParams& params() const { return part_; }
  bool is_all() const { return is_all_; }  // there is no other
  bool is_last() const;

 private:
  // Returns how many of the last query blocks of the group, of those before `end`, are a part.
  int64_t BlocksBefore(int64_t end) const;

  const DeviceTraits& device_;
  const int64_t most_work_;
  const size_t heads_at_once_;
  kernels::AttentionParams group_;                  // its heads, all of their query blocks
  absl::Span<const kernels::HeadWork> heads_left_;  // behind the group
  int64_t blocks_left_ = 0;                         // of the group, before the part
  bool is_all_ = false;
  kernels::AttentionParams part_;
  std::vector<kernels::HeadWork> part_work_;  // unless the part is the group
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_ATTENTION_PARTS_H_
