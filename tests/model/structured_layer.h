// One layer of one prompt on the CPU, whose heads follow content, look for one key, or do neither.
#ifndef PREFILLD_TESTS_MODEL_STRUCTURED_LAYER_H_
#define PREFILLD_TESTS_MODEL_STRUCTURED_LAYER_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "model/sparse/pattern_sharing.h"

namespace prefilld::model {

inline constexpr int kHeadDim = 64;
inline constexpr int kBlockTokens = 64;
inline constexpr int kNumHeads = 4;
inline constexpr float kStrength = 12.0f;  // logit of a key that a query looks for

// The kinds of heads. kTopics follows content: the prompt consists of segments, each about one
// topic, and a query attends to all earlier segments about its own topic. These are few blocks, in
// different places for every query block, so that the last block's columns and diagonals say little
// about the others. kSinkAndLocal attends to the first token and the neighbourhood, which
// vertical-slash covers. kNeedle attends to one key from everywhere, and else to its own block.
enum class Structure { kTopics, kSinkAndLocal, kNeedle };

// One layer of one prompt on the CPU, with all heads in one cluster unless a test says otherwise.
class Layer {
 public:
  // `structure` and `topic_seed` are per head. Heads with the same topic seed see the same topics.
  Layer(int64_t num_tokens, const std::vector<Structure>& structure,
        const std::vector<int>& topic_seed)
      : num_tokens_(num_tokens) {
    config_.num_layers = 2;
    config_.num_heads = kNumHeads;
    config_.num_kv_heads = kNumHeads;
    config_.head_dim = kHeadDim;
    clusters_.num_clusters = 1;
    clusters_.cluster_of.assign(2, std::vector<int>(kNumHeads, 0));
    auto device = CreateDevice(DeviceChoice::kCpu, 2);
    EXPECT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
    const size_t count = num_tokens * kNumHeads * kHeadDim;
    q_.assign(count, 0.0f);
    k_.assign(count, 0.0f);
    v_.resize(count);
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (float& value : v_) value = normal(random);
    for (int head = 0; head < kNumHeads; ++head) {
      switch (structure[head]) {
        case Structure::kTopics:
          FillTopics(head, topic_seed[head]);
          break;
        case Structure::kSinkAndLocal:
          FillSinkAndLocal(head);
          break;
        case Structure::kNeedle:
          FillNeedle(head);
          break;
      }
    }
  }

  HeadClusters& clusters() { return clusters_; }
  void RemoveClusters() {
    clusters_.num_clusters = 0;
    clusters_.cluster_of.assign(2, std::vector<int>(kNumHeads, HeadClusters::kNoCluster));
  }

  // Computes the attention of layers 0 .. num_layers - 1 on the same inputs, and returns the output
  // and report of the last one.
  std::vector<float> Attend(const AttentionOptions& options, LayerReport* report,
                            int num_layers = 1) {
    const auto workspace = SharingWorkspace::Create(device_.get(), &config_, &clusters_,
                                                    num_tokens_ + 100, kBlockTokens);
    EXPECT_TRUE(workspace.ok()) << workspace.status();
    auto sharing = PatternSharing::Create(workspace->get(), num_tokens_ + 100);
    EXPECT_TRUE(sharing.ok()) << sharing.status();
    (*sharing)->StartPrompt(num_tokens_, options);
    std::vector<float> out;
    for (int layer = 0; layer < num_layers; ++layer) {
      *report = LayerReport();
      report->layer = layer;
      out = q_;
      EXPECT_TRUE((*sharing)->Attend(layer, Params(&out), report).ok());
      EXPECT_TRUE((*sharing)->Report(report).ok());
    }
    return out;
  }

  std::vector<float> AttendDense() {
    std::vector<float> out = q_;
    kernels::AttentionParams params = Params(&out);
    std::vector<kernels::HeadWork> work(kNumHeads);
    for (int head = 0; head < kNumHeads; ++head) work[head].head = head;
    params.work = work.data();
    params.num_work = kNumHeads;
    EXPECT_TRUE(device_->ops().Attention(params).ok());
    return out;
  }

 private:
  float* Q(int64_t token, int head) { return &q_[(token * kNumHeads + head) * kHeadDim]; }
  float* K(int64_t token, int head) { return &k_[(head * num_tokens_ + token) * kHeadDim]; }

  void FillTopics(int head, int seed) {
    std::mt19937 random(seed);
    const float length = std::sqrt(kStrength * std::sqrt(static_cast<float>(kHeadDim)));
    for (int64_t first = 0; first < num_tokens_; first += kBlockTokens) {
      const int topic = static_cast<int>(random() % 12);
      for (int64_t t = first; t < std::min(first + kBlockTokens, num_tokens_); ++t) {
        Q(t, head)[topic] = length;
        K(t, head)[topic] = length;
      }
    }
  }

  // Puts half of the mass on token 0. The rest falls off with distance, by angles that turn slowly.
  void FillSinkAndLocal(int head) {
    const float length = std::sqrt(kStrength * std::sqrt(static_cast<float>(kHeadDim)));
    for (int64_t t = 0; t < num_tokens_; ++t) {
      const float angle = static_cast<float>(t) * 0.02f;
      Q(t, head)[0] = K(t, head)[0] = length * std::cos(angle);
      Q(t, head)[1] = K(t, head)[1] = length * std::sin(angle);
      Q(t, head)[2] = length;
    }
    std::fill_n(K(0, head), 3, 0.0f);
    K(0, head)[2] = 1.6f * length;
  }

  // Every key of a query's own block has logit 8, and the needle 16. Nearly all mass is the
  // needle's. The mean over eight keys hides it: there its logit is 2.
  void FillNeedle(int head) {
    constexpr int kNeedleAxis = kHeadDim - 1;
    for (int64_t t = 0; t < num_tokens_; ++t) {
      const auto own_axis = t / kBlockTokens % kNeedleAxis;
      Q(t, head)[own_axis] = K(t, head)[own_axis] = 8.0f;
      Q(t, head)[kNeedleAxis] = 16.0f;
    }
    K(num_tokens_ / 3, head)[kNeedleAxis] = 8.0f;
  }

  kernels::AttentionParams Params(std::vector<float>* out) {
    return {.q = out->data(),
            .k = k_.data(),
            .v = v_.data(),
            .out = out->data(),
            .num_queries = num_tokens_,
            .num_keys = num_tokens_,
            .kv_head_stride = num_tokens_ * kHeadDim,
            .num_heads = kNumHeads,
            .num_kv_heads = kNumHeads,
            .head_dim = kHeadDim,
            .block_tokens = kBlockTokens,
            .scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim))};
  }

  const int64_t num_tokens_;
  ModelConfig config_;
  HeadClusters clusters_;
  std::unique_ptr<Device> device_;
  std::vector<float> q_, k_, v_;
};

// Returns ||out - dense|| / ||dense|| of one head.
inline double HeadError(const std::vector<float>& out, const std::vector<float>& dense, int head) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    if (static_cast<int>(i / kHeadDim % kNumHeads) != head) continue;
    difference += (out[i] - dense[i]) * (out[i] - dense[i]);
    norm += dense[i] * dense[i];
  }
  return std::sqrt(difference / norm);
}

inline AttentionOptions Options(AttentionPolicy policy) {
  AttentionOptions options;
  options.policy = policy;
  options.min_budget_tokens = 128;
  return options;
}

inline const std::vector<Structure> kAllTopics(kNumHeads, Structure::kTopics);
inline const std::vector<int> kSameTopics(kNumHeads, 1);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_STRUCTURED_LAYER_H_
