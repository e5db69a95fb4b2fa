#include "tests/model/one_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace prefilld::model {

OneLayer::OneLayer(int64_t num_tokens) : num_tokens_(num_tokens) {
  EXPECT_LE(num_blocks(), kHeadDim);
  config_.num_layers = 2;
  config_.num_heads = kNumHeads;
  config_.num_kv_heads = kNumKvHeads;
  config_.head_dim = kHeadDim;
  auto device = CreateDevice(DeviceChoice::kCpu, 2);
  EXPECT_TRUE(device.ok()) << device.status();
  device_ = *std::move(device);
  qkv_ = kernels::testing::MakeQkv(num_tokens, num_tokens, kNumHeads, kNumKvHeads, kHeadDim, 7);
  std::fill(qkv_.v.begin(), qkv_.v.end(), 0.0f);
  for (int64_t i = 0; i < kNumKvHeads * num_tokens; ++i) {
    qkv_.v[i * kHeadDim + i % num_tokens / kBlockTokens] = 1.0f;
  }
}

kernels::AttentionParams OneLayer::Params(std::vector<float>* out) {
  *out = qkv_.q;
  return {.q = out->data(),
          .k = qkv_.k.data(),
          .v = qkv_.v.data(),
          .out = out->data(),
          .num_queries = num_tokens_,
          .num_keys = num_tokens_,
          .kv_head_stride = num_tokens_ * kHeadDim,
          .num_heads = kNumHeads,
          .num_kv_heads = kNumKvHeads,
          .head_dim = kHeadDim,
          .block_tokens = kBlockTokens,
          .scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim))};
}

std::vector<double> OneLayer::Mass(int64_t query, int head) const {
  const float* q = &qkv_.q[(query * kNumHeads + head) * kHeadDim];
  const float* k = &qkv_.k[head / (kNumHeads / kNumKvHeads) * num_tokens_ * kHeadDim];
  std::vector<double> weight(query + 1);
  for (int64_t key = 0; key <= query; ++key) {
    weight[key] = std::inner_product(q, q + kHeadDim, k + key * kHeadDim, 0.0) /
                  std::sqrt(static_cast<double>(kHeadDim));
  }
  const double max = *std::max_element(weight.begin(), weight.end());
  for (double& w : weight) w = std::exp(w - max);
  const double sum = std::accumulate(weight.begin(), weight.end(), 0.0);
  std::vector<double> mass(num_blocks());
  for (int64_t key = 0; key <= query; ++key) mass[key / kBlockTokens] += weight[key] / sum;
  return mass;
}

std::vector<double> OneLayer::RecallOf(const std::vector<float>& out,
                                       const std::vector<int64_t>& rows) const {
  std::vector<double> recall(kNumHeads);
  for (int head = 0; head < kNumHeads; ++head) {
    int64_t num_queries = 0;
    for (const int64_t row : rows) {
      const int64_t end = std::min(num_tokens_, (row + 1) * kBlockTokens);
      for (int64_t query = row * kBlockTokens; query < end; ++query, ++num_queries) {
        const std::vector<double> mass = Mass(query, head);
        const float* computed = &out[(query * kNumHeads + head) * kHeadDim];
        for (int64_t block = 0; block < num_blocks(); ++block) {
          if (computed[block] > 0.0f) recall[head] += mass[block];
        }
      }
    }
    recall[head] /= static_cast<double>(num_queries);
  }
  return recall;
}

std::vector<int64_t> OneLayer::AllRows() const {
  std::vector<int64_t> rows(num_blocks());
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return rows;
}

}  // namespace prefilld::model
