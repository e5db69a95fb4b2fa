// Measures from which prompt length on policy `share` is faster than dense attention, on this
// device and for this model's shape. Policy `auto` changes there.
#ifndef PREFILLD_MODEL_PREFILL_CROSSOVER_H_
#define PREFILLD_MODEL_PREFILL_CROSSOVER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/pattern_sharing.h"
#include "model/sparse/sharing_workspace.h"

namespace prefilld::model {

struct EngineParts;

// The time of one layer's attention over a prompt, both ways.
struct AttentionTimes {
  int64_t num_tokens = 0;
  double dense_us = 0.0;
  double share_us = 0.0;  // everything that share adds is in it: scores, choice, waiting
  double density = 1.0;   // of share
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
// longer, the prompt would be longer than the tensors, or three seconds would be over.
//
// Queries, keys and values are noise, so that the blocks of a row lie apart and differ from head to
// head, and no product is cheap because its factors are zero. The times of dense attention and of
// finding patterns do not depend on what the prompt says. That of sparse attention does, and noise
// tells nothing of it: share is measured at a density of about 0.8 for 1024 tokens, 0.65 for 2048,
// 0.47 for 8192 and towards 0.4 for more, in blocks of 128. Real text on real weights
// (SmolLM2-135M, default thresholds) has 0.77 at 2048 tokens, 0.39 at 8192 and 0.44 at 16384.
//
// Where the device computes ahead of the host, dense attention is measured as a prefill runs it,
// the next layer queued behind this one, and share with the wait for the host that it has.
//
// `attention` describes tensors that nobody uses yet, for as many tokens as may be measured; they
// are overwritten. Its output must lie apart from its queries. `sharing` has room for as many and
// serves no prompt; `workspace` is its own.
absl::StatusOr<std::vector<AttentionTimes>> MeasureAttention(
    SharingWorkspace* workspace, PatternSharing* sharing, const kernels::AttentionParams& attention,
    const AttentionOptions& options);

// Returns CrossoverOf what MeasureAttention finds in an engine's memory before any prompt uses it,
// and logs it.
absl::StatusOr<int64_t> MeasureCrossover(EngineParts& parts);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_CROSSOVER_H_
