// A checkpoint's tensors in a device's memory, fused the way the layer step uses them.
#ifndef PREFILLD_MODEL_CHECKPOINT_WEIGHTS_H_
#define PREFILLD_MODEL_CHECKPOINT_WEIGHTS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"

namespace prefilld::model {

// The weights of one layer, in the device's compute dtype. A buffer whose data() is null is absent.
struct LayerWeights {
  DeviceBuffer input_norm;   // [hidden]
  DeviceBuffer qkv;          // [(num_heads + 2 * num_kv_heads) * head_dim, hidden]: q, k, v
  DeviceBuffer qkv_bias;     // [(num_heads + 2 * num_kv_heads) * head_dim] or absent
  DeviceBuffer q_norm;       // [head_dim] or absent
  DeviceBuffer k_norm;       // [head_dim] or absent
  DeviceBuffer output;       // [hidden, num_heads * head_dim]
  DeviceBuffer output_bias;  // [hidden] or absent
  DeviceBuffer post_norm;    // [hidden]
  DeviceBuffer gate_up;      // [2 * intermediate, hidden]: gate, then up
  DeviceBuffer down;         // [hidden, intermediate]
};

struct Weights {
  DeviceBuffer embedding;  // [vocab_size, hidden]
  std::vector<LayerWeights> layers;
  DeviceBuffer final_norm;  // [hidden]
  DeviceBuffer head;        // [vocab_size, hidden]; absent when tied: use embedding
  const void* head_data() const { return head.data() ? head.data() : embedding.data(); }
  // 32 hexadecimal digits, equal for equal configuration and weights whatever the sharding, the
  // device or the path. They cover every byte of the tensors (model/checkpoint/fingerprint.h).
  std::string fingerprint;
  // Tensors of the files that the model does not use, in order. They are not read, so that nothing
  // about them matters.
  std::vector<std::string> unused_tensors;
};

// Loads the weights: memory-maps the safetensors of `checkpoint_dir` (model.safetensors, or the
// shards named by model.safetensors.index.json; bf16, fp16 or fp32), checks every tensor's presence
// and shape against the config, converts and uploads. INVALID_ARGUMENT with file, tensor and reason
// for a hostile or truncated file. A tensor that the model does not use is no error, unless it
// belongs to a part that is computed: then config.json describes another model. Staging memory on
// the host is bounded, and the files stay mapped only during the call.
absl::StatusOr<Weights> LoadWeights(const std::string& checkpoint_dir, const ModelConfig& config,
                                    Device& device);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_WEIGHTS_H_
