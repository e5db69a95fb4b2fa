// Decoding over a paged KV cache, for the reference decode worker.
#ifndef PREFILLD_MODEL_DECODE_DECODER_H_
#define PREFILLD_MODEL_DECODE_DECODER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/kv_pack.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"

namespace prefilld::model {

struct DecoderOptions {
  std::string checkpoint_dir;
  std::vector<std::string> overruled_config_keys;  // see LoadModelConfig
  DeviceChoice device = DeviceChoice::kAuto;
  int cpu_threads = 0;
  int block_tokens = 16;                            // 16, 32, 64 or 128
  kernels::KvOrder order = kernels::KvOrder::kNhd;  // or kHnd: the pools of K and V lie apart
  int64_t pool_tokens = 0;  // capacity of the KV pool in tokens, over all sequences
};

// One model on one device, with one pool of KV blocks in the device's compute dtype. Pool blocks
// are numbered 0 .. num_pool_blocks() - 1, and the caller keeps account of who owns them.
// StoreBlocks and Step may be called from different threads; Steps exclude each other.
class Decoder {
 public:
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const DecoderOptions& options);
  virtual ~Decoder() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const std::string& fingerprint() const = 0;
  // Returns the tensors of the checkpoint that the model does not use, see Weights.
  virtual const std::vector<std::string>& unused_tensors() const = 0;
  virtual const std::string& device_name() const = 0;
  virtual kernels::DType kv_dtype() const = 0;
  virtual int64_t num_pool_blocks() const = 0;
  // Returns the bytes of one block of one layer, K or V.
  virtual size_t block_bytes() const = 0;

  // Copies packed K or V (is_value) of consecutive sequence blocks from host memory, in this pool's
  // order and dtype, to the pool blocks named. The data are those of the heads [first_head,
  // first_head + num_heads): [pool_blocks.size(), one block of num_heads heads]. They may lie in
  // pieces of any sizes, one after the other. INVALID_ARGUMENT: they have another size.
  virtual absl::Status StoreBlocks(int layer, bool is_value, absl::Span<const int32_t> pool_blocks,
                                   int first_head, int num_heads,
                                   absl::Span<const absl::Span<const uint8_t>> data) = 0;

  // Computes one decode step of one sequence: the token at `position`, whose KV is written to the
  // pool, attends to positions 0 .. position. Returns the logits after it, [vocab_size].
  // `rope_tokens` is the prompt's length, at which dynamic NTK fixes its base.
  virtual absl::StatusOr<std::vector<float>> Step(uint32_t token, int64_t position,
                                                  int64_t rope_tokens,
                                                  absl::Span<const int32_t> block_table) = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DECODE_DECODER_H_
