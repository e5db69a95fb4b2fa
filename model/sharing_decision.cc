#include "model/sharing_decision.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "model/head_clusters.h"

namespace prefilld::model {
namespace {

// p ln(p / m) with its limit at p = 0; a NaN stays one. In fp32, as its arguments are: a layer's
// distances stand between the device's work.
float RelativeEntropyTerm(float p, float m) { return p == 0.0f ? 0.0f : p * std::log(p / m); }

// One element's share of twice the Jensen-Shannon divergence.
float DivergenceTerm(float p, float q) {
  const float m = 0.5f * (p + q);
  return RelativeEntropyTerm(p, m) + RelativeEntropyTerm(q, m);
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
  double sum = 0.0;
  for (size_t i = 0; i < p.size(); ++i) sum += DivergenceTerm(p[i], q[i]);
  return ToDistance(sum);
}

double DistanceFromUniform(absl::Span<const float> p) {
  const float uniform = 1.0f / static_cast<float>(p.size());
  double sum = 0.0;
  for (float mass : p) sum += DivergenceTerm(mass, uniform);
  return ToDistance(sum);
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

void SelectBlocks(absl::Span<const float> mass, float gamma, absl::Span<uint32_t> row) {
  // A heap yields the few blocks that matter without sorting all of them.
  const auto after = [&](int a, int b) {
    return mass[a] < mass[b] || (mass[a] == mass[b] && a > b);
  };
  std::vector<int> heap(mass.size());
  std::iota(heap.begin(), heap.end(), 0);
  std::make_heap(heap.begin(), heap.end(), after);
  const double target = gamma * std::accumulate(mass.begin(), mass.end(), 0.0);
  double covered = 0.0;
  while (!heap.empty() && covered < target) {
    std::pop_heap(heap.begin(), heap.end(), after);
    const int block = heap.back();
    heap.pop_back();
    covered += mass[block];
    row[block / 32] |= uint32_t{1} << (block % 32);
  }
}

}  // namespace prefilld::model
