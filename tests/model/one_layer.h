// One layer of one prompt on the CPU, with the attention that its heads should have.
#ifndef PREFILLD_TESTS_MODEL_ONE_LAYER_H_
#define PREFILLD_TESTS_MODEL_ONE_LAYER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/attention.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/sparse/head_clusters.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::model {

// The heads have the four characters of structured_qkv.h in turn. The values tell blocks apart: a
// token's value is 1 at the number of its block and 0 elsewhere. So the output of a query shows
// which blocks were computed. There may be at most head_dim blocks.
class OneLayer {
 public:
  static constexpr int kHeadDim = 64;
  static constexpr int kBlockTokens = 64;
  static constexpr int kNumHeads = 8;
  static constexpr int kNumKvHeads = 2;

  explicit OneLayer(int64_t num_tokens);

  Device& device() { return *device_; }
  const ModelConfig& config() const { return config_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_blocks() const { return kernels::CeilDiv(num_tokens_, kBlockTokens); }
  std::vector<float>& q() { return qkv_.q; }  // [num_tokens, kNumHeads, kHeadDim]
  std::vector<float>& k() { return qkv_.k; }  // [kNumKvHeads, num_tokens, kHeadDim]

  // Describes attention in place on `out`, which becomes a copy of q().
  kernels::AttentionParams Params(std::vector<float>* out);

  // Returns the true mass of one query's attention by key block, in double precision.
  std::vector<double> Mass(int64_t query, int head) const;

  // Returns the recall of every head by its definition, from the output of a run, over the queries
  // of `rows`.
  std::vector<double> RecallOf(const std::vector<float>& out,
                               const std::vector<int64_t>& rows) const;
  std::vector<int64_t> AllRows() const;

 private:
  const int64_t num_tokens_;
  ModelConfig config_;
  std::unique_ptr<Device> device_;
  kernels::testing::Qkv qkv_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_ONE_LAYER_H_
