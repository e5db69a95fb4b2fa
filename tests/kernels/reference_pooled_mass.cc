#include "tests/kernels/reference_pooled_mass.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace prefilld::kernels::reference {
namespace {

// Returns the mean of element d over a block.
double Mean(const float* x, int64_t stride, const PooledMassParams& p, int64_t block, int d) {
  const int64_t first = block * p.block_tokens;
  const int64_t end = std::min(first + p.block_tokens, p.num_tokens);
  double sum = 0;
  for (int64_t t = first; t < end; ++t) sum += x[t * stride + d];
  return sum / static_cast<double>(end - first);
}

}  // namespace

void PooledMass(const PooledMassParams& p) {
  const int64_t n = (p.num_tokens + p.block_tokens - 1) / p.block_tokens;
  const int kv_head = p.head / (p.num_heads / p.num_kv_heads);
  const float* q = static_cast<const float*>(p.q) + p.head * p.head_dim;
  const float* k = static_cast<const float*>(p.k) + kv_head * p.kv_head_stride;
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> weight(row + 1);
    double sum = 0;
    for (int64_t c = 0; c <= row; ++c) {
      double product = 0;
      for (int d = 0; d < p.head_dim; ++d) {
        product +=
            Mean(q, int64_t{p.num_heads} * p.head_dim, p, row, d) * Mean(k, p.head_dim, p, c, d);
      }
      sum += weight[c] = std::exp(p.scale * product);
    }
    for (int64_t c = 0; c < n; ++c) {
      p.block_mass[row * n + c] = c <= row ? static_cast<float>(weight[c] / sum) : 0.0f;
    }
  }
}

}  // namespace prefilld::kernels::reference
