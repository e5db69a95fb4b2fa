// Small checkpoints with random weights, as Hugging Face would have saved them.
#ifndef PREFILLD_TESTS_MODEL_RANDOM_CHECKPOINT_H_
#define PREFILLD_TESTS_MODEL_RANDOM_CHECKPOINT_H_

#include <cstdint>
#include <string>

#include "model/checkpoint/config.h"

namespace prefilld::model {

// Returns a Llama-like configuration with grouped queries and head_dim 64: 4 layers, 4 query heads,
// 2 KV heads, width 128, vocabulary 320. A change to one field gives every family. RoPE is of the
// default kind, and may be dynamic NTK.
ModelConfig SmallRandomConfig();

// A temporary folder with config.json and model.safetensors (bf16, so that every device holds the
// same numbers), removed on destruction. Equal (config, seed) give equal bytes on every machine.
// Query and key weights are scaled so that attention is peaked rather than flat. Aborts when the
// disk refuses.
class RandomCheckpoint {
 public:
  explicit RandomCheckpoint(const ModelConfig& config, uint64_t seed = 1);
  RandomCheckpoint() : RandomCheckpoint(SmallRandomConfig()) {}
  RandomCheckpoint(const RandomCheckpoint&) = delete;
  RandomCheckpoint& operator=(const RandomCheckpoint&) = delete;
  ~RandomCheckpoint();

  const std::string& dir() const { return dir_; }
  const ModelConfig& config() const { return config_; }

  // Adds a file to the folder, such as head_clusters.json.
  void WriteFile(const std::string& name, const std::string& content) const;

 private:
  ModelConfig config_;
  std::string dir_;
};

// Returns the text of a head-cluster file in which every head of the model shares: each in its own
// cluster, or all in one.
std::string ClusterFile(const ModelConfig& config, bool alone);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_RANDOM_CHECKPOINT_H_
