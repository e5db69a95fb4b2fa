// Records what a model's heads attend to in one prompt, computed densely, into a file.
//
// The file is safetensors, all fp32. With n = blocks of block_tokens in the prompt's N tokens, H
// heads, and c = CeilDiv(n, cell_blocks) cells, there are for every layer, in this order:
//   layers.<layer>.estimate                [H, n]     mass per key block, last query block
//   layers.<layer>.vertical                [H, N]     mass per key position, last query block
//   layers.<layer>.slash                   [H, N]     mass per offset behind the query, likewise
//   layers.<layer>.block_mass              [H, c, c]  exact mass, as kernels/attention.h defines
//                                                     it, of cells of cell_blocks blocks a side
//   layers.<layer>.vertical_slash_mass     [H]        share of the head's exact mass that its own
//                                                     vertical-slash set at gamma holds
//   layers.<layer>.vertical_slash_density  [H]        that set's share of the causal blocks
// The first three are what the server knows when it decides (model/sparse/pattern_sharing.h).
// Metadata: see CalibrationMetadata.
#ifndef PREFILLD_MODEL_CALIBRATION_ATTENTION_RECORDER_H_
#define PREFILLD_MODEL_CALIBRATION_ATTENTION_RECORDER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/calibration/safetensors_writer.h"
#include "model/checkpoint/config.h"
#include "model/checkpoint/weights.h"
#include "model/device/device.h"
#include "model/prefill/hidden_states.h"
#include "model/prefill/layer_step.h"
#include "model/sparse/head_estimate.h"

namespace prefilld::model {

struct RecorderOptions {
  int64_t max_tokens = 0;  // longest prompt; fixes the workspace
  int block_tokens = 128;  // 64 or 128, as the server that will use the clusters
  // The largest number of cells a side. Blocks are joined by the smallest whole number that
  // satisfies it; the values are then those of larger blocks. 0: every block is a cell.
  int64_t max_grid = 0;
  float gamma = 0.9f;               // of the vertical-slash sets, (0, 1]
  int64_t min_budget_tokens = 128;  // likewise
};

// Returns the blocks per cell and side for a prompt.
int64_t CellBlocks(int64_t num_tokens, const RecorderOptions& options);

std::vector<TensorShape> RecordedTensors(const ModelConfig& config, int64_t num_tokens,
                                         const RecorderOptions& options);

// Returns, as text, what the values depend on: format, model_fingerprint, num_layers, num_heads,
// num_tokens, block_tokens, cell_blocks, gamma, min_budget_tokens. The caller adds what it knows of
// the prompt.
std::map<std::string, std::string> CalibrationMetadata(const ModelConfig& config,
                                                       const std::string& fingerprint,
                                                       int64_t num_tokens,
                                                       const RecorderOptions& options);

// Runs prompts one after the other. Device memory, allocated by Create: activations and the KV of
// one layer, vertical-slash patterns of all heads (n * n / 8 bytes each), and block mass (n * n * 4
// bytes a head) for as many heads at a time as fit into 256 MB, at least one. On the host, one
// head's block mass or one of the other tensors. Not thread-safe.
class AttentionRecorder {
 public:
  // All parameters are borrowed and must outlive the recorder.
  static absl::StatusOr<std::unique_ptr<AttentionRecorder>> Create(Device* device,
                                                                   const ModelConfig* config,
                                                                   const Weights* weights,
                                                                   const RecorderOptions& options);

  // Records a prompt of 1 .. max_tokens ids below vocab_size and appends RecordedTensors() to
  // `file`. Calls `progress` after every layer.
  absl::Status Record(absl::Span<const uint32_t> tokens, SafetensorsWriter& file,
                      absl::FunctionRef<void(int layer)> progress);

 private:
  AttentionRecorder(Device* device, const ModelConfig* config, const RecorderOptions& options)
      : device_(*device), config_(*config), options_(options) {}

  absl::Status Allocate(const Weights* weights);

  // These are the stages of a layer, in order. The second overwrites the queries.
  absl::Status RecordEstimate(SafetensorsWriter& file);
  absl::Status RecordMass(SafetensorsWriter& file);
  absl::Status RecordVerticalSlash(SafetensorsWriter& file);

  absl::Status AppendFromDevice(const DeviceBuffer& buffer, int64_t count, SafetensorsWriter& file);
  absl::Status MeasureVerticalSlash(int head, const float* block_mass);

  kernels::AttentionParams Attention() const;
  int64_t kv_head_stride() const;
  int64_t pattern_words() const { return num_blocks_ * kernels::PatternWords(num_blocks_); }

  Device& device_;
  const ModelConfig& config_;
  const RecorderOptions options_;
  std::unique_ptr<LayerStep> step_;
  HiddenStates states_;

  // These lie in device memory. H is heads, n blocks, W words of a pattern's row.
  DeviceBuffer keys_, values_;  // [num_kv_heads, max_tokens rounded up, head_dim]
  std::unique_ptr<HeadEstimate> estimate_;
  DeviceBuffer vertical_slash_patterns_;  // [H, n, W]
  DeviceBuffer block_mass_;               // [as many as fit, n, n]
  DeviceBuffer pattern_mass_;             // [H] double
  DeviceBuffer pattern_blocks_;           // [H] int64

  int64_t num_tokens_ = 0;  // of the prompt
  int64_t num_blocks_ = 0;
  std::vector<float> host_;   // what is on its way from the device to the file
  std::vector<float> cells_;  // [c, c]
};

// Joins blocks into cells: sums the columns of a cell and takes the mean over its query rows.
// `mass` is [num_blocks, num_blocks], `cells` [c, c].
void JoinBlocks(absl::Span<const float> mass, int64_t num_tokens, int block_tokens,
                int64_t cell_blocks, absl::Span<float> cells);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CALIBRATION_ATTENTION_RECORDER_H_
