#include "kernels/cpu/ops.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/attention.h"

namespace prefilld::kernels::cpu {
namespace {

void SetBit(uint32_t* bits, int64_t i) { bits[i / 32] |= 1u << (i % 32); }
bool TestBit(const uint32_t* bits, int64_t i) { return (bits[i / 32] >> (i % 32)) & 1; }

// Makes one integer of a mass and its index. In ascending order they are sorted by descending mass,
// then by ascending index, because the bits of positive floats have the order of the floats. A NaN
// counts as no mass.
uint64_t SortKey(float mass, int64_t index) {
  const uint32_t bits = mass > 0.0f ? std::bit_cast<uint32_t>(mass) : 0;
  return uint64_t{~bits} << 32 | static_cast<uint64_t>(index);
}
uint32_t IndexOf(uint64_t key) { return static_cast<uint32_t>(key); }
float MassOf(uint64_t key) { return std::bit_cast<float>(~static_cast<uint32_t>(key >> 32)); }

// Fills `keys` with the n elements of `mass` and returns how many of the first ones form the
// smallest set whose mass reaches gamma of the total, but at least `floor` of them, or n. Only
// those are in order.
//
// The set is usually small, so only a prefix is sorted, which doubles until it is long enough.
int64_t SelectSmallestSet(const float* mass, int64_t n, double gamma, int64_t floor,
                          uint64_t* keys) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = SortKey(mass[i], i);
    total += MassOf(keys[i]);
  }
  const double target = gamma * total;
  double sum = 0.0;
  int64_t taken = 0;
  for (int64_t sorted = 0, prefix = std::max<int64_t>(256, floor); sorted < n; prefix *= 2) {
    const int64_t end = std::min(prefix, n);
    if (end < n) std::nth_element(keys + sorted, keys + end, keys + n);
    std::sort(keys + sorted, keys + end);
    sorted = end;
    for (; taken < end; ++taken) {
      const float next = MassOf(keys[taken]);
      if (taken >= floor && (sum >= target || next == 0.0f)) return taken;
      sum += next;
    }
  }
  return taken;
}

}  // namespace

void VerticalSlash(const VerticalSlashParams& params) {
  const int64_t n = params.num_keys;
  const int64_t block = params.block_tokens;
  const int64_t num_blocks = CeilDiv(n, block);
  const int64_t words = PatternWords(num_blocks);
  const int64_t floor = std::min(params.min_budget_tokens, n);
  const int num_threads = std::min(omp_get_max_threads(), params.num_heads);
  // This is the only allocation: eight bytes per key for each thread.
  const auto sets = std::make_unique_for_overwrite<uint64_t[]>(num_threads * n);
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int h = 0; h < params.num_heads; ++h) {
    uint64_t* set = &sets[omp_get_thread_num() * n];
    uint32_t* columns = params.columns + h * words;
    std::fill_n(columns, words, 0u);
    SetBit(columns, 0);
    int64_t taken = SelectSmallestSet(params.vertical + h * n, n, params.gamma, floor, set);
    for (int64_t i = 0; i < taken; ++i) SetBit(columns, IndexOf(set[i]) / block);

    uint32_t* diagonals = params.diagonals + h * words;
    std::fill_n(diagonals, words, 0u);
    SetBit(diagonals, 0);
    taken = SelectSmallestSet(params.slash + h * n, n, params.gamma, floor, set);
    for (int64_t i = 0; i < taken; ++i) {
      const int64_t offset = IndexOf(set[i]);
      const int64_t diagonal = offset / block;
      SetBit(diagonals, diagonal);
      if (offset % block != 0 && diagonal + 1 < num_blocks) SetBit(diagonals, diagonal + 1);
    }
  }
}

void ExpandVerticalSlash(const ExpandVerticalSlashParams& params) {
  const int64_t words = PatternWords(params.num_key_blocks);
  const int64_t rows = params.num_query_blocks;
  const int64_t first_block = params.num_key_blocks - rows;
  if (params.blocks != nullptr) std::fill_n(params.blocks, params.num_heads, int64_t{0});
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t i = 0; i < params.num_heads * rows; ++i) {
    const int64_t head = i / rows;
    const uint32_t* columns = params.columns + head * words;
    const uint32_t* diagonals = params.diagonals + head * words;
    uint32_t* pattern = params.pattern + i * words;
    std::fill_n(pattern, words, 0u);
    const int64_t block = first_block + i % rows;
    int64_t count = 0;
    for (int64_t c = 0; c <= block; ++c) {
      if (!TestBit(columns, c) && !TestBit(diagonals, block - c)) continue;
      SetBit(pattern, c);
      ++count;
    }
    if (params.blocks == nullptr) continue;
#pragma omp atomic
    params.blocks[head] += count;
  }
}

void SelectRows(const SelectRowsParams& params) {
  const int64_t num_key_blocks = params.num_key_blocks;
  const int64_t words = PatternWords(num_key_blocks);
  const int64_t first_block = num_key_blocks - params.num_query_blocks;
  if (params.blocks != nullptr) std::fill_n(params.blocks, params.num_heads, int64_t{0});
  // This is the only allocation: eight bytes per key block for each thread.
  std::vector<uint64_t> sets(static_cast<size_t>(num_key_blocks * omp_get_max_threads()));
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t row = 0; row < params.num_heads * params.num_query_blocks; ++row) {
    uint64_t* set = &sets[omp_get_thread_num() * num_key_blocks];
    uint32_t* pattern = params.pattern + row * words;
    if (!params.join) std::fill_n(pattern, words, 0u);
    const int64_t block = first_block + row % params.num_query_blocks;
    const int64_t taken = SelectSmallestSet(params.block_mass + row * num_key_blocks, block + 1,
                                            params.gamma, 0, set);
    for (int64_t i = 0; i < taken; ++i) SetBit(pattern, IndexOf(set[i]));
    SetBit(pattern, 0);
    SetBit(pattern, block);
    if (params.blocks == nullptr) continue;
    int64_t count = 0;
    for (int64_t word = 0; word < words; ++word) count += std::popcount(pattern[word]);
#pragma omp atomic
    params.blocks[row / params.num_query_blocks] += count;
  }
}

void MeasurePattern(const MeasurePatternParams& params) {
  const int64_t words = PatternWords(params.num_key_blocks);
  int64_t blocks = 0;
  double mass = 0.0;
  // One thread does it, so that the sum does not depend on the number of threads.
  for (int64_t row = 0; row < params.num_query_blocks; ++row) {
    const uint32_t* last_row = row + 1 == params.num_query_blocks ? params.last_row : nullptr;
    for (int64_t word = 0; word < words; ++word) {
      uint32_t bits = params.pattern[row * words + word] | (last_row ? last_row[word] : 0);
      blocks += std::popcount(bits);
      if (params.block_mass == nullptr) continue;
      const float* row_mass = params.block_mass + row * params.num_key_blocks + word * 32;
      for (; bits != 0; bits &= bits - 1) mass += row_mass[std::countr_zero(bits)];
    }
  }
  *params.blocks = blocks;
  if (params.block_mass != nullptr)
    *params.mass = mass / static_cast<double>(params.num_query_blocks);
}

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

// Plain rather than fast: it serves a baseline of the evaluation alone.
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
