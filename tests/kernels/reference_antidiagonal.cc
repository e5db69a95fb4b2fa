#include "tests/kernels/reference_antidiagonal.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace prefilld::kernels::reference {
namespace {

// The score of query fold i on key fold j, and whether any pair of a query and a key makes it up.
struct Score {
  double sum = 0.0;
  bool exists = false;
};

Score ScoreOf(const AntidiagonalScoresParams& p, int head, int64_t i, int64_t j) {
  const int64_t first_position = p.num_keys - p.num_queries;
  const float* k =
      static_cast<const float*>(p.k) + head / (p.num_heads / p.num_kv_heads) * p.kv_head_stride;
  Score score;
  for (int64_t t = 0; t < p.stride; ++t) {
    const int64_t query = p.stride * i + p.stride - 1 - t;
    const int64_t key = p.stride * j + t;
    if (query < first_position || query >= p.num_keys || key >= p.num_keys) continue;
    score.exists = true;
    const float* q = static_cast<const float*>(p.q) +
                     ((query - first_position) * p.num_heads + head) * p.head_dim;
    for (int e = 0; e < p.head_dim; ++e) {
      score.sum += static_cast<double>(q[e]) * k[key * p.head_dim + e];
    }
  }
  return score;
}

// Returns the probabilities of query fold i, [i + 1].
std::vector<double> RowOf(const AntidiagonalScoresParams& p, int head, int64_t i) {
  std::vector<double> row(static_cast<size_t>(i + 1));
  double total = 0.0;
  for (int64_t j = 0; j <= i; ++j) {
    const Score score = ScoreOf(p, head, i, j);
    if (!score.exists && i > 0) continue;
    row[static_cast<size_t>(j)] = std::exp(score.sum * static_cast<double>(p.scale) / p.stride);
    total += row[static_cast<size_t>(j)];
  }
  for (double& x : row) x /= total;
  return row;
}

}  // namespace

void AntidiagonalScores(const AntidiagonalScoresParams& p) {
  const int64_t first_position = p.num_keys - p.num_queries;
  const int64_t key_blocks = CeilDiv(p.num_keys, p.block_tokens);
  const int64_t first_block = first_position / p.block_tokens;
  float* out = p.block_mass;
  for (int place = 0; place < p.num_scored; ++place) {
    for (int64_t block = first_block; block < key_blocks; ++block, out += key_blocks) {
      const int64_t first = std::max(block * p.block_tokens, first_position) / p.stride;
      const int64_t end = CeilDiv(std::min((block + 1) * p.block_tokens, p.num_keys), p.stride);
      std::vector<double> mass(static_cast<size_t>(key_blocks));
      for (int64_t i = first; i < end; ++i) {
        const std::vector<double> row = RowOf(p, p.heads[place], i);
        for (size_t j = 0; j < row.size(); ++j) {
          mass[j * static_cast<size_t>(p.stride) / static_cast<size_t>(p.block_tokens)] +=
              row[j] / static_cast<double>(end - first);
        }
      }
      std::copy(mass.begin(), mass.end(), out);
    }
  }
}

}  // namespace prefilld::kernels::reference
