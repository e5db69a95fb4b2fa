#include "tests/client/fake_decoder.h"

namespace prefilld::client {

FakeDecoder::FakeDecoder(int64_t num_blocks) : num_blocks_(num_blocks) {
  config_.vocab_size = 100;
  config_.num_layers = 3;
  config_.num_kv_heads = 2;
  config_.head_dim = 8;
  config_.max_positions = 1000;
  config_.eos_token_ids = {99};
}

absl::Status FakeDecoder::StoreBlocks(int layer, bool is_value,
                                      absl::Span<const int32_t> pool_blocks, int first_head,
                                      int num_heads,
                                      absl::Span<const absl::Span<const uint8_t>> data) {
  absl::MutexLock lock(&mu_);
  std::string bytes;
  for (const auto& piece : data) bytes.append(piece.begin(), piece.end());
  for (size_t i = 0; i < pool_blocks.size(); ++i) {
    stored_[{layer, is_value, pool_blocks[i]}] = bytes.substr(i * block_bytes(), block_bytes());
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> FakeDecoder::Step(uint32_t token, int64_t position,
                                                     int64_t rope_tokens,
                                                     absl::Span<const int32_t> block_table) {
  if (before_step) {
    if (absl::Status status = before_step(token); !status.ok()) return status;
  }
  absl::MutexLock lock(&mu_);
  steps_.emplace_back(token, position);
  std::vector<float> logits(config_.vocab_size, 0.0f);
  logits[(token + 1) % logits.size()] = 10.0f;
  return logits;
}

std::map<std::tuple<int, bool, int32_t>, std::string> FakeDecoder::stored() {
  absl::MutexLock lock(&mu_);
  return stored_;
}

std::vector<std::pair<uint32_t, int64_t>> FakeDecoder::steps() {
  absl::MutexLock lock(&mu_);
  return steps_;
}

}  // namespace prefilld::client
