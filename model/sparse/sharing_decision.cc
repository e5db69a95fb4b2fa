#include "model/sparse/sharing_decision.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "model/sparse/head_clusters.h"

namespace prefilld::model {
namespace {

// Computes ln x to about 1e-7 for positive x, and some finite number for zero. Unlike the library's
// it has no table or branch, so that loops over it become vector code.
float Log(float x) {
  // x = 2^exponent (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const int32_t exponent = (std::bit_cast<int32_t>(x) - 0x3f3504f3) >> 23;
  const float f = std::bit_cast<float>(std::bit_cast<int32_t>(x) - (exponent << 23)) - 1.0f;
  // The coefficients are the least-squares fit of (ln(1 + f) - f) / f^2 at Chebyshev nodes.
  float series = 0.0900420212f;
  series = series * f - 0.14257795f;
  series = series * f + 0.148064596f;
  series = series * f - 0.165750481f;
  series = series * f + 0.199731059f;
  series = series * f - 0.250016096f;
  series = series * f + 0.333336598f;
  series = series * f - 0.499999948f;
  return series * f * f + f + static_cast<float>(exponent) * 0.693147181f;
}

// Computes one element's share of twice the Jensen-Shannon divergence: p ln(p / m) + q ln(q / m)
// with m = (p + q) / 2. FLT_MIN avoids 1 / 0 when p = q = 0; it is too small to change any other
// sum.
float DivergenceTerm(float p, float q) {
  const float inverse_m = 2.0f / (p + q + std::numeric_limits<float>::min());
  return p * Log(p * inverse_m) + q * Log(q * inverse_m);
}

// Computes twice the divergence of p from q(i), in fp32 as its arguments are. The terms of a run
// are computed first and added up then, so that both loops become vector code. It must be fast
// because the device waits for the distances of a layer.
template <typename Other>
double TwiceDivergence(const float* p, size_t n, Other q) {
  constexpr size_t kRun = 256;
  constexpr size_t kLanes = 4;
  float terms[kRun];
  double sums[kLanes] = {};
  for (size_t first = 0; first < n; first += kRun) {
    const size_t count = std::min(kRun, n - first);
    for (size_t i = 0; i < count; ++i) terms[i] = DivergenceTerm(p[first + i], q(first + i));
    std::fill(terms + count, terms + kRun, 0.0f);
    for (size_t i = 0; i < kRun; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += terms[i + lane];
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rounding may leave a sum just below zero.
double ToDistance(double twice_divergence) {
  return twice_divergence < 0.0 ? 0.0 : std::sqrt(0.5 * twice_divergence);
}

// This rule is the paper's exclusion of highly sparse heads. No distance exceeds 0.8326, so delta 1
// switches it off.
bool DeltaRuleExcludes(absl::Span<const float> estimate, float delta) {
  return delta < 1.0f && DistanceFromUniform(estimate) > delta;
}

}  // namespace

double JensenShannonDistance(absl::Span<const float> p, absl::Span<const float> q) {
  return ToDistance(TwiceDivergence(p.data(), p.size(), [q = q.data()](size_t i) { return q[i]; }));
}

double DistanceFromUniform(absl::Span<const float> p) {
  const float uniform = 1.0f / static_cast<float>(p.size());
  return ToDistance(TwiceDivergence(p.data(), p.size(), [uniform](size_t) { return uniform; }));
}

std::vector<int> ChoosePivots(absl::Span<const int> cluster_of, absl::Span<const float> estimate,
                              absl::Span<const ClusterPivot> pivots,
                              const AttentionOptions& options) {
  std::vector<int> chosen;
  if (options.coverage <= 0.0f) return chosen;
  const size_t num_key_blocks = estimate.size() / cluster_of.size();
  for (size_t head = 0; head < cluster_of.size(); ++head) {
    const int cluster = cluster_of[head];
    if (cluster == HeadClusters::kNoCluster || pivots[cluster].exists()) continue;
    const bool cluster_has_one = std::any_of(
        chosen.begin(), chosen.end(), [&](int pivot) { return cluster_of[pivot] == cluster; });
    if (cluster_has_one) continue;
    if (DeltaRuleExcludes(estimate.subspan(head * num_key_blocks, num_key_blocks), options.delta)) {
      continue;
    }
    chosen.push_back(static_cast<int>(head));
  }
  return chosen;
}

HeadRole DecideHead(int layer, absl::Span<const float> estimate, const ClusterPivot* pivot,
                    const AttentionOptions& options) {
  if (pivot == nullptr || !pivot->exists() || !pivot->worth_sharing) {
    return HeadRole::kScored;
  }
  if (pivot->layer == layer && !options.same_layer_sharing) return HeadRole::kScored;
  if (DeltaRuleExcludes(estimate, options.delta)) return HeadRole::kScored;
  const bool alike = JensenShannonDistance(estimate, pivot->estimate) < options.tau;
  if (!alike) return HeadRole::kScored;
  return pivot->scored ? HeadRole::kScoreSharing : HeadRole::kShared;
}

bool WorthSharing(const PatternFigures& pattern, const PatternFigures& vertical_slash,
                  float coverage) {
  if (coverage >= 1.0f) return true;
  if (coverage <= 0.0f) return false;
  return vertical_slash.mass < coverage ||
         static_cast<double>(vertical_slash.blocks) > 1.25 * static_cast<double>(pattern.blocks);
}

}  // namespace prefilld::model
