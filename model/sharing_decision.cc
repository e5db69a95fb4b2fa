#include "model/sharing_decision.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "model/head_clusters.h"

namespace prefilld::model {
namespace {

// ln x to about 1e-7 for positive x; any number for zero. Without a table or a branch, unlike the
// library's, so that compilers turn loops over it into vector code.
float Log(float x) {
  // x = 2^exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2)).
  const int32_t exponent = (std::bit_cast<int32_t>(x) - 0x3f3504f3) >> 23;
  const float mantissa = std::bit_cast<float>(std::bit_cast<int32_t>(x) - (exponent << 23));
  // ln m = 2 artanh((m - 1) / (m + 1)); the argument is at most 0.172.
  const float a = (mantissa - 1.0f) / (mantissa + 1.0f);
  const float b = a * a;
  const float series = 1.0f + b * (1.0f / 3 + b * (1.0f / 5 + b * (1.0f / 7 + b * (1.0f / 9))));
  return 2.0f * a * series + static_cast<float>(exponent) * 0.69314718f;
}

// p ln(p / m) with its limit at p = 0; a NaN stays one.
float RelativeEntropyTerm(float p, float m) { return p == 0.0f ? 0.0f : p * Log(p / m); }

// One element's share of twice the Jensen-Shannon divergence.
float DivergenceTerm(float p, float q) {
  const float m = 0.5f * (p + q);
  return RelativeEntropyTerm(p, m) + RelativeEntropyTerm(q, m);
}

// Twice the divergence of p from q(i). The distances of a layer stand between the device's work:
// fp32 in lanes, which are emptied into the sum before their rounding adds up.
template <typename Other>
double TwiceDivergence(absl::Span<const float> p, Other q) {
  constexpr size_t kLanes = 8;
  constexpr size_t kRun = 32 * kLanes;
  double sum = 0.0;
  for (size_t first = 0; first < p.size(); first += kRun) {
    const size_t end = std::min(p.size(), first + kRun);
    float lanes[kLanes] = {};
    size_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += DivergenceTerm(p[i + lane], q(i + lane));
      }
    }
    for (; i < end; ++i) lanes[0] += DivergenceTerm(p[i], q(i));
    for (float lane : lanes) sum += lane;
  }
  return sum;
}

// Rounding may leave a sum just below zero.
double ToDistance(double twice_divergence) {
  return twice_divergence < 0.0 ? 0.0 : std::sqrt(0.5 * twice_divergence);
}

// The paper's exclusion of highly sparse heads. No distance exceeds 0.8326, so delta 1 is off.
bool DeltaRuleExcludes(absl::Span<const float> estimate, float delta) {
  return delta < 1.0f && DistanceFromUniform(estimate) > delta;
}

}  // namespace

double JensenShannonDistance(absl::Span<const float> p, absl::Span<const float> q) {
  return ToDistance(TwiceDivergence(p, [q = q.data()](size_t i) { return q[i]; }));
}

double DistanceFromUniform(absl::Span<const float> p) {
  const float uniform = 1.0f / static_cast<float>(p.size());
  return ToDistance(TwiceDivergence(p, [uniform](size_t) { return uniform; }));
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
    return HeadRole::kVerticalSlash;
  }
  if (pivot->layer == layer && !options.same_layer_sharing) return HeadRole::kVerticalSlash;
  if (DeltaRuleExcludes(estimate, options.delta)) return HeadRole::kVerticalSlash;
  const bool alike = JensenShannonDistance(estimate, pivot->estimate) < options.tau;
  return alike ? HeadRole::kShared : HeadRole::kVerticalSlash;
}

bool WorthSharing(const PatternFigures& pattern, const PatternFigures& vertical_slash,
                  float coverage) {
  if (coverage >= 1.0f) return true;
  if (coverage <= 0.0f) return false;
  return vertical_slash.mass < coverage ||
         static_cast<double>(vertical_slash.blocks) > 1.25 * static_cast<double>(pattern.blocks);
}

}  // namespace prefilld::model
