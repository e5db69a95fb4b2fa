#include "tests/kernels/reference_pattern.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/attention.h"

namespace prefilld::kernels::reference {
namespace {

using Bits = std::vector<bool>;

Bits FromWords(const uint32_t* words, int64_t n) {
  Bits bits(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) bits[static_cast<size_t>(i)] = words[i / 32] >> (i % 32) & 1;
  return bits;
}

void ToWords(const Bits& bits, uint32_t* words) {
  std::fill_n(words, PatternWords(static_cast<int64_t>(bits.size())), 0u);
  for (size_t i = 0; i < bits.size(); ++i) {
    if (bits[i]) words[i / 32] |= 1u << (i % 32);
  }
}

// Takes indices by descending mass, the lowest first among equals, until they reach gamma of the
// total and number at least `floor`.
std::vector<int64_t> SmallestSet(const float* mass, int64_t n, double gamma, int64_t floor) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [mass](int64_t a, int64_t b) { return mass[a] > mass[b]; });
  const double total = std::accumulate(mass, mass + n, 0.0);
  double sum = 0.0;
  size_t taken = 0;
  while (taken < order.size()) {
    const bool enough = sum >= gamma * total || mass[order[taken]] == 0.0f;
    if (enough && static_cast<int64_t>(taken) >= floor) break;
    sum += mass[order[taken++]];
  }
  order.resize(taken);
  return order;
}

}  // namespace

void Estimate(const EstimateParams& p) {
  const int64_t num_blocks = CeilDiv(p.num_keys, p.block_tokens);
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const float* k =
        static_cast<const float*>(p.k) + head / (p.num_heads / p.num_kv_heads) * p.kv_head_stride;
    std::vector<double> vertical(static_cast<size_t>(p.num_keys));
    std::vector<double> slash(vertical.size());
    std::vector<double> block_mass(static_cast<size_t>(num_blocks));
    for (int64_t row = 0; row < p.num_queries; ++row) {
      const int64_t position = p.num_keys - p.num_queries + row;
      const float* q = static_cast<const float*>(p.q) + (row * p.num_heads + head) * p.head_dim;
      std::vector<double> weights(static_cast<size_t>(position + 1));
      double sum = 0.0;
      for (int64_t key = 0; key <= position; ++key) {
        double dot = 0.0;
        for (int i = 0; i < p.head_dim; ++i) {
          dot += static_cast<double>(q[i]) * k[key * p.head_dim + i];
        }
        sum += weights[static_cast<size_t>(key)] = std::exp(dot * p.scale);
      }
      for (int64_t key = 0; key <= position; ++key) {
        const double share =
            weights[static_cast<size_t>(key)] / sum / static_cast<double>(p.num_queries);
        vertical[static_cast<size_t>(key)] += share;
        slash[static_cast<size_t>(position - key)] += share;
        block_mass[static_cast<size_t>(key / p.block_tokens)] += share;
      }
    }
    std::copy(vertical.begin(), vertical.end(), p.vertical + head * p.num_keys);
    std::copy(slash.begin(), slash.end(), p.slash + head * p.num_keys);
    std::copy(block_mass.begin(), block_mass.end(), p.block_mass + head * num_blocks);
  }
}

void VerticalSlash(const VerticalSlashParams& p) {
  const int64_t n = p.num_keys;
  const int64_t num_blocks = CeilDiv(n, p.block_tokens);
  for (int64_t head = 0; head < p.num_heads; ++head) {
    Bits columns(static_cast<size_t>(num_blocks)), diagonals(columns.size());
    columns[0] = diagonals[0] = true;
    for (int64_t key : SmallestSet(p.vertical + head * n, n, p.gamma, p.min_budget_tokens)) {
      columns[static_cast<size_t>(key / p.block_tokens)] = true;
    }
    for (int64_t offset : SmallestSet(p.slash + head * n, n, p.gamma, p.min_budget_tokens)) {
      const int64_t first = offset / p.block_tokens;
      const int64_t last = (offset + p.block_tokens - 1) / p.block_tokens;
      for (int64_t j = first; j <= std::min(last, num_blocks - 1); ++j) {
        diagonals[static_cast<size_t>(j)] = true;
      }
    }
    ToWords(columns, p.columns + head * PatternWords(num_blocks));
    ToWords(diagonals, p.diagonals + head * PatternWords(num_blocks));
  }
}

void ExpandVerticalSlash(const ExpandVerticalSlashParams& p) {
  const Bits columns = FromWords(p.columns, p.num_key_blocks);
  const Bits diagonals = FromWords(p.diagonals, p.num_key_blocks);
  for (int64_t row = 0; row < p.num_query_blocks; ++row) {
    const int64_t block = p.num_key_blocks - p.num_query_blocks + row;
    Bits bits(static_cast<size_t>(p.num_key_blocks));
    for (int64_t c = 0; c <= block; ++c) {
      bits[static_cast<size_t>(c)] =
          columns[static_cast<size_t>(c)] || diagonals[static_cast<size_t>(block - c)];
    }
    ToWords(bits, p.pattern + row * PatternWords(p.num_key_blocks));
  }
}

void SelectRows(const SelectRowsParams& p) {
  for (int64_t row = 0; row < p.num_query_blocks; ++row) {
    const int64_t block = p.num_key_blocks - p.num_query_blocks + row;
    Bits bits(static_cast<size_t>(p.num_key_blocks));
    for (int64_t c : SmallestSet(p.block_mass + row * p.num_key_blocks, block + 1, p.gamma, 0)) {
      bits[static_cast<size_t>(c)] = true;
    }
    bits[0] = bits[static_cast<size_t>(block)] = true;
    ToWords(bits, p.pattern + row * PatternWords(p.num_key_blocks));
  }
}

void MeasurePattern(const MeasurePatternParams& p) {
  double mass = 0.0;
  *p.blocks = 0;
  for (int64_t row = 0; row < p.num_query_blocks; ++row) {
    const Bits chosen =
        FromWords(p.pattern + row * PatternWords(p.num_key_blocks), p.num_key_blocks);
    const bool joined = p.last_row != nullptr && row == p.num_query_blocks - 1;
    const Bits more = joined ? FromWords(p.last_row, p.num_key_blocks) : Bits(chosen.size());
    for (int64_t c = 0; c < p.num_key_blocks; ++c) {
      if (!chosen[static_cast<size_t>(c)] && !more[static_cast<size_t>(c)]) continue;
      ++*p.blocks;
      if (p.block_mass != nullptr) mass += p.block_mass[row * p.num_key_blocks + c];
    }
  }
  if (p.block_mass != nullptr) *p.mass = mass / static_cast<double>(p.num_query_blocks);
}

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
