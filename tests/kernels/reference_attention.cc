#include "tests/kernels/reference_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace prefilld::kernels::reference {
namespace {

double Dot(const float* a, const float* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

void Softmax(std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0.0;
  for (double& value : x) sum += value = std::exp(value - max);
  for (double& value : x) value /= sum;
}

bool IsChosen(const AttentionParams& p, const HeadWork& work, int64_t row, int64_t num_rows,
              int64_t block, int64_t num_key_blocks) {
  if (work.pattern == nullptr || block == num_key_blocks - num_rows + row) return true;
  const uint32_t bit = 1u << (block % 32);
  if (work.pattern[row * PatternWords(num_key_blocks) + block / 32] & bit) return true;
  return work.last_row != nullptr && row == num_rows - 1 && (work.last_row[block / 32] & bit);
}

}  // namespace

void Attention(const AttentionParams& p) {
  const int64_t first_query = p.num_keys - p.num_queries;
  const int64_t num_key_blocks = CeilDiv(p.num_keys, p.block_tokens);
  const int64_t first_row = first_query / p.block_tokens;
  const int64_t num_rows = num_key_blocks - first_row;
  for (int w = 0; w < p.num_work; ++w) {
    const HeadWork& work = p.work[w];
    const int64_t kv_head = work.head / (p.num_heads / p.num_kv_heads);
    const float* k = static_cast<const float*>(p.k) + kv_head * p.kv_head_stride;
    const float* v = static_cast<const float*>(p.v) + kv_head * p.kv_head_stride;
    std::vector<double> mass(static_cast<size_t>(num_rows * num_key_blocks));
    std::vector<int64_t> rows_of_block(static_cast<size_t>(num_rows));
    for (int64_t query = 0; query < p.num_queries; ++query) {
      const int64_t position = first_query + query;
      const int64_t row = position / p.block_tokens - first_row;
      const int64_t offset = (query * p.num_heads + work.head) * p.head_dim;
      std::vector<double> weights(static_cast<size_t>(position + 1));
      for (int64_t key = 0; key <= position; ++key) {
        const bool chosen = IsChosen(p, work, row, num_rows, key / p.block_tokens, num_key_blocks);
        weights[static_cast<size_t>(key)] =
            chosen ? p.scale * Dot(static_cast<const float*>(p.q) + offset, k + key * p.head_dim,
                                   p.head_dim)
                   : -std::numeric_limits<double>::infinity();
      }
      Softmax(weights);
      ++rows_of_block[static_cast<size_t>(row)];
      std::vector<double> out(static_cast<size_t>(p.head_dim));
      for (int64_t key = 0; key <= position; ++key) {
        const double weight = weights[static_cast<size_t>(key)];
        mass[static_cast<size_t>(row * num_key_blocks + key / p.block_tokens)] += weight;
        for (int i = 0; i < p.head_dim; ++i) {
          out[static_cast<size_t>(i)] += weight * v[key * p.head_dim + i];
        }
      }
      std::copy(out.begin(), out.end(), static_cast<float*>(p.out) + offset);
    }
    if (work.block_mass == nullptr) continue;
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t block = 0; block < num_key_blocks; ++block) {
        const auto i = static_cast<size_t>(row * num_key_blocks + block);
        work.block_mass[i] = static_cast<float>(
            mass[i] / static_cast<double>(rows_of_block[static_cast<size_t>(row)]));
      }
    }
  }
}

void PagedAttention(const PagedAttentionParams& p) {
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
    const auto element = [&](int64_t key) {
      return p.block_table[key / p.block_tokens] * p.block_stride + kv_head * p.head_stride +
             key % p.block_tokens * p.token_stride;
    };
    const float* q = static_cast<const float*>(p.q) + head * p.head_dim;
    std::vector<double> weights(static_cast<size_t>(p.num_keys));
    for (int64_t key = 0; key < p.num_keys; ++key) {
      weights[static_cast<size_t>(key)] =
          p.scale * Dot(q, static_cast<const float*>(p.k_pool) + element(key), p.head_dim);
    }
    Softmax(weights);
    for (int i = 0; i < p.head_dim; ++i) {
      double sum = 0.0;
      for (int64_t key = 0; key < p.num_keys; ++key) {
        sum += weights[static_cast<size_t>(key)] *
               static_cast<const float*>(p.v_pool)[element(key) + i];
      }
      static_cast<float*>(p.out)[head * p.head_dim + i] = static_cast<float>(sum);
    }
  }
}

}  // namespace prefilld::kernels::reference
