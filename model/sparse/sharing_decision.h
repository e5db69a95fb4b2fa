// The decisions of SharePrefill (Peng et al., arXiv 2505.19578) as pure functions of small host
// arrays. model/sparse/pattern_sharing.h calls them. Below, "the paper" is that article, and "ours"
// marks what we decided differently, with the reason.
#ifndef PREFILLD_MODEL_SPARSE_SHARING_DECISION_H_
#define PREFILLD_MODEL_SPARSE_SHARING_DECISION_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "model/sparse/attention_options.h"

namespace prefilld::model {

// Returns the Jensen-Shannon distance with natural logarithm: the square root of the divergence, 0
// (equal) to sqrt(ln 2) = 0.8326 (disjoint). p and q are distributions of equal length; 0 ln 0 = 0.
double JensenShannonDistance(absl::Span<const float> p, absl::Span<const float> q);
double DistanceFromUniform(absl::Span<const float> p);

// A head that neither is a pivot nor shares has a pattern of its own: a scored one under policy
// share, the vertical-slash set under policy vertical_slash. kPivot is an exact pivot. A scored
// pivot is kScored like other heads, and the heads that take its pattern are kScoreSharing.
enum class HeadRole : uint8_t { kScored, kVerticalSlash, kPivot, kShared, kScoreSharing };

// The head that finds the pattern of its cluster, for one prompt: exactly, or by scores
// (SharingForm).
struct ClusterPivot {
  static constexpr int kNone = -1;
  int layer = kNone;  // provenance; kNone: no pivot yet
  int head = kNone;
  // The pivot's own estimate from the last query block, [num_key_blocks]. The paper compares with
  // the last row of its exact block mass. Ours is the same quantity up to a partial last block, and
  // is known before any attention runs, so that a whole layer is decided at once.
  std::vector<float> estimate;
  bool scored = false;         // the form of the cluster
  bool worth_sharing = false;  // WorthSharing() of the exact block mass; true of a scored pivot
  // Both are known of a scored pivot once its layer is reported, since only reports need them.
  int64_t pattern_blocks = 0;      // of the whole pattern
  std::vector<uint32_t> last_row;  // of the pattern, as kernels/attention.h lays out a row
  bool exists() const { return layer != kNone; }
};

// Chooses the heads of a layer that become pivots, ascending: the first head of every cluster that
// has no pivot yet, unless the delta rule excludes it (its distance from uniform is above
// options.delta). cluster_of is [num_heads], with HeadClusters::kNoCluster; estimate is [num_heads,
// num_key_blocks]; pivots is [num_clusters]. With coverage 0 no cluster can ever share, so there
// are no pivots.
std::vector<int> ChoosePivots(absl::Span<const int> cluster_of, absl::Span<const float> estimate,
                              absl::Span<const ClusterPivot> pivots,
                              const AttentionOptions& options);

// Decides the role of a head of `layer` that is no pivot of this layer: kShared or kScoreSharing,
// as the pivot has it, or kScored. `pivot` is that of its cluster, or null if it is in no cluster
// that shares; the pivots of this layer must have been measured. The head shares when the cluster
// is worth it, when its estimate is nearer than tau to the pivot's, and when the delta rule does
// not exclude it. Ours: a pivot of the same layer serves at once, because pivots run first. Without
// options.same_layer_sharing it serves from the next layer on, as in the paper's release.
HeadRole DecideHead(int layer, absl::Span<const float> estimate, const ClusterPivot* pivot,
                    const AttentionOptions& options);

// The share of a head's exact block mass that a set of blocks holds, and the cost of the set.
struct PatternFigures {
  double mass = 0.0;  // mean over the rows, 0 to 1
  int64_t blocks = 0;
};

// Tells whether a cluster is worth sharing. Ours, in place of excluding heads far from uniform:
// sharing pays where vertical-slash fails, and the last query block alone cannot tell where.
// `pattern` is the pivot's own, and `vertical_slash` the pivot's vertical-slash set as it would
// run. The cluster shares when that set holds less than `coverage` of the pivot's mass, or when it
// costs over a quarter more blocks than the pattern. It may cost that quarter more, since it
// follows each head by itself. Coverage 1 shares always, 0 never.
bool WorthSharing(const PatternFigures& pattern, const PatternFigures& vertical_slash,
                  float coverage);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_SHARING_DECISION_H_
