#ifndef PREFILLD_TESTS_CLIENT_FAKE_DECODER_H_
#define PREFILLD_TESTS_CLIENT_FAKE_DECODER_H_

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "model/decode/decoder.h"

namespace prefilld::client {

// A decoder without a model, with the shape of SmallLayout() (scripted_server.h) and a vocabulary
// of 100. After token t the most likely token is t + 1. It keeps what is stored.
class FakeDecoder : public model::Decoder {
 public:
  explicit FakeDecoder(int64_t num_blocks = 16);

  const model::ModelConfig& config() const override { return config_; }
  // For changes before the first request.
  model::ModelConfig& mutable_config() { return config_; }
  const std::string& fingerprint() const override { return fingerprint_; }
  const std::vector<std::string>& unused_tensors() const override { return unused_tensors_; }
  const std::string& device_name() const override { return device_name_; }
  kernels::DType kv_dtype() const override { return kernels::DType::kFp32; }
  int64_t num_pool_blocks() const override { return num_blocks_; }
  size_t block_bytes() const override { return 16 * 2 * 8 * 4; }
  absl::Status StoreBlocks(int layer, bool is_value, absl::Span<const int32_t> pool_blocks,
                           int first_head, int num_heads,
                           absl::Span<const absl::Span<const uint8_t>> data) override;
  absl::StatusOr<std::vector<float>> Step(uint32_t token, int64_t position, int64_t rope_tokens,
                                          absl::Span<const int32_t> block_table) override;

  // Called at the beginning of every step. An error that it returns becomes the step's error.
  std::function<absl::Status(uint32_t token)> before_step;
  // Returns the bytes of each block by (layer, is_value, pool block).
  std::map<std::tuple<int, bool, int32_t>, std::string> stored();
  // Returns (token, position) of the steps so far.
  std::vector<std::pair<uint32_t, int64_t>> steps();

 private:
  model::ModelConfig config_;
  const std::string fingerprint_ = "f00d";
  const std::vector<std::string> unused_tensors_;
  const std::string device_name_ = "fake";
  const int64_t num_blocks_;
  absl::Mutex mu_;
  std::map<std::tuple<int, bool, int32_t>, std::string> stored_ ABSL_GUARDED_BY(mu_);
  std::vector<std::pair<uint32_t, int64_t>> steps_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::client

#endif  // PREFILLD_TESTS_CLIENT_FAKE_DECODER_H_
