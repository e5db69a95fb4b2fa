#include "kernels/cpu/pooled_mass.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/attention.h"

namespace prefilld::kernels::cpu {
namespace {

// Computes mean[d] over the tokens [first, end) of x, which are token_stride elements apart.
void Mean(const float* x, int64_t token_stride, int64_t first, int64_t end, int head_dim,
          float* mean) {
  std::fill_n(mean, head_dim, 0.0f);
  for (int64_t token = first; token < end; ++token) {
    for (int d = 0; d < head_dim; ++d) mean[d] += x[token * token_stride + d];
  }
  for (int d = 0; d < head_dim; ++d) mean[d] /= static_cast<float>(end - first);
}

void Softmax(float* x, int64_t n) {
  const float max = *std::max_element(x, x + n);
  for (int64_t i = 0; i < n; ++i) x[i] = std::exp(x[i] - max);
  const float sum = std::accumulate(x, x + n, 0.0f);
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

}  // namespace

void PooledMass(const PooledMassParams& p) {
  const int64_t num_blocks = CeilDiv(p.num_tokens, p.block_tokens);
  const float* q = static_cast<const float*>(p.q) + int64_t{p.head} * p.head_dim;
  const float* k =
      static_cast<const float*>(p.k) + p.head / (p.num_heads / p.num_kv_heads) * p.kv_head_stride;
  float* q_mean = p.scratch;
  float* k_mean = p.scratch + num_blocks * p.head_dim;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * p.block_tokens;
      const int64_t end = std::min(first + p.block_tokens, p.num_tokens);
      Mean(q, int64_t{p.num_heads} * p.head_dim, first, end, p.head_dim,
           q_mean + block * p.head_dim);
      Mean(k, p.head_dim, first, end, p.head_dim, k_mean + block * p.head_dim);
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t row = 0; row < num_blocks; ++row) {
      float* mass = p.block_mass + row * num_blocks;
      const float* row_q = q_mean + row * p.head_dim;
      for (int64_t block = 0; block <= row; ++block) {
        mass[block] = p.scale * std::inner_product(row_q, row_q + p.head_dim,
                                                   k_mean + block * p.head_dim, 0.0f);
      }
      Softmax(mass, row + 1);
      std::fill(mass + row + 1, mass + num_blocks, 0.0f);
    }
  }
}

}  // namespace prefilld::kernels::cpu
