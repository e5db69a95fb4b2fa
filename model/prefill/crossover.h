// Measures from which prompt length on policy `share` is faster than dense attention, on this
// device and for this model's shape. Policy `auto` changes there.
#ifndef PREFILLD_MODEL_PREFILL_CROSSOVER_H_
#define PREFILLD_MODEL_PREFILL_CROSSOVER_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/pattern_sharing.h"
#include "model/sparse/sharing_workspace.h"

namespace prefilld::model {

// The time of one layer's attention over a prompt, both ways.
struct AttentionTimes {
  int64_t num_tokens = 0;
  double dense_us = 0.0;
  double share_us = 0.0;  // everything that share adds is in it: scores, choice, waiting
};

// Returns the length from which on share takes no longer than dense, but max_tokens + 1 when that
// is longer than max_tokens or when nothing was measured. `measured` is by ascending length.
//
// - If share was slower at one length and not at the next, the result lies between the two. The
//   ratio of the two times is taken to change evenly with the length's logarithm.
// - If share was slower at every length, the result lies beyond the greatest. Dense attention is
//   taken to grow with the square of the length. A part of share's time grows with it, namely three
//   quarters of dense attention; the rest is taken to stay what it was.
int64_t CrossoverOf(absl::Span<const AttentionTimes> measured, int64_t max_tokens);

// Measures attention of prompts of 512 tokens, twice as many and so on, until share takes no
// longer, the prompt would be longer than max_tokens, or three seconds would be over; then returns
// CrossoverOf them. The times of dense attention and of finding patterns do not depend on the
// prompt. That of sparse attention does: it is measured at a density of 0.80 for 512 tokens, 0.67
// for 1024, 0.55 for 2048 and towards 0.4 for more, in blocks of 128. Prompts of the embedded model
// have less: 0.64 for 1024 and 0.46 for 2048.
//
// `attention` describes the tensors for max_tokens tokens; they are overwritten. `sharing` has room
// for as many and serves no prompt; `workspace` is its own.
absl::StatusOr<int64_t> MeasureCrossover(SharingWorkspace* workspace, PatternSharing* sharing,
                                         const kernels::AttentionParams& attention,
                                         const AttentionOptions& options);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_CROSSOVER_H_
