#include "model/checkpoint/weights.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <numeric>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "kernels/cpu/threads.h"
#include "model/checkpoint/fingerprint.h"
#include "model/checkpoint/refused.h"
#include "model/checkpoint/safetensors.h"
#include "model/checkpoint/weight_conversion.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

using kernels::DType;

constexpr int kMaxWorkers = 8;  // saturate a link to a GPU, and bound the staging memory

int64_t ElementCount(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

bool IsMaskType(absl::string_view foreign_dtype) {
  return foreign_dtype == "BOOL" || foreign_dtype == "U8" || foreign_dtype == "I32" ||
         foreign_dtype == "I64";
}

// Adds to the error about a weight that the files hold a quantised form of it, where they do.
absl::Status ExplainQuantized(const Checkpoint& checkpoint, absl::string_view name,
                              const absl::Status& error) {
  absl::string_view stem = name;
  const bool is_weight = absl::ConsumeSuffix(&stem, ".weight");
  const bool quantized =
      checkpoint.tensors().contains(name) ||  // then Find refused its type
      (is_weight && (checkpoint.tensors().contains(absl::StrCat(stem, ".qweight")) ||
                     checkpoint.tensors().contains(absl::StrCat(stem, ".weight_packed"))));
  if (!quantized) return error;
  return absl::InvalidArgumentError(
      absl::StrCat(error.message(), "; the files hold quantised weights: ", kUseUnquantized));
}

// Collects first which tensor goes where, then moves them all. After the first error placing does
// nothing.
class WeightLoader {
 public:
  WeightLoader(const Checkpoint& checkpoint, Device& device)
      : checkpoint_(checkpoint), device_(device), dtype_(device.traits().compute_dtype) {}

  struct Part {
    std::string name;
    std::vector<int64_t> shape;
  };

  // Allocates `buffer` for the parts, one after the other.
  void Place(DeviceBuffer& buffer, const std::vector<Part>& parts);

  // Names a part of the model that is computed, such as "model.norm.". A tensor of such a part that
  // was not placed would change what the part computes.
  void Computes(std::string prefix) { computed_.push_back(std::move(prefix)); }

  // Converts and uploads everything placed, and digests the content on the way. Fails if the
  // checkpoint has a tensor of a computed part that was not placed.
  absl::Status Transfer();

  // The tensors of the checkpoint that were not placed.
  std::vector<std::string> UnusedTensors() const;

  std::string fingerprint(const ModelConfig& config) const { return Fingerprint(config, digests_); }

 private:
  // One stretch of one tensor, which a worker takes at a time.
  struct Stretch {
    const Tensor* source = nullptr;
    std::byte* destination = nullptr;  // of the whole tensor, device memory
    int64_t index = 0;
    ContentDigest* digest = nullptr;
  };

  absl::Status Allocate(DeviceBuffer& buffer, const std::vector<Part>& parts);
  absl::Status CheckComputedParts() const;
  absl::Status TransferStretch(const Stretch& stretch, void* staging);
  void Work();

  const Checkpoint& checkpoint_;
  Device& device_;
  const DType dtype_;

  absl::Status placed_;  // the first error of Place
  std::vector<std::string> computed_;
  std::map<std::string, TensorDigest> digests_;  // of the tensors placed
  std::vector<Stretch> stretches_;

  std::atomic<size_t> next_stretch_{0};
  absl::Mutex mu_;
  absl::Status first_error_ ABSL_GUARDED_BY(mu_);
};

absl::Status WeightLoader::Allocate(DeviceBuffer& buffer, const std::vector<Part>& parts) {
  int64_t total = 0;
  for (const Part& part : parts) {
    const absl::StatusOr<const Tensor*> found = checkpoint_.Find(part.name);
    if (!found.ok()) return ExplainQuantized(checkpoint_, part.name, found.status());
    const Tensor* tensor = *found;
    if (tensor->shape != part.shape) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", part.name, " has shape [", absl::StrJoin(tensor->shape, ", "),
                       "]; config.json asks for [", absl::StrJoin(part.shape, ", "), "]"));
    }
    total += ElementCount(part.shape);
  }
  PREFILLD_ASSIGN_OR_RETURN(buffer, device_.Allocate(static_cast<size_t>(total) * SizeOf(dtype_)));
  return absl::OkStatus();
}

void WeightLoader::Place(DeviceBuffer& buffer, const std::vector<Part>& parts) {
  if (placed_.ok()) placed_ = Allocate(buffer, parts);
  if (!placed_.ok()) return;
  auto* destination = buffer.as<std::byte>();
  for (const Part& part : parts) {
    const int64_t elements = ElementCount(part.shape);
    TensorDigest& digest = digests_[part.name];
    digest.tensor = *checkpoint_.Find(part.name);  // Allocate has found it
    digest.stretches.resize(static_cast<size_t>(kernels::CeilDiv(elements, kDigestElements)));
    for (size_t i = 0; i < digest.stretches.size(); ++i) {
      stretches_.push_back(
          {digest.tensor, destination, static_cast<int64_t>(i), &digest.stretches[i]});
    }
    destination += static_cast<size_t>(elements) * SizeOf(dtype_);
  }
}

std::vector<std::string> WeightLoader::UnusedTensors() const {
  std::vector<std::string> unused;
  for (const auto& [name, tensor] : checkpoint_.tensors()) {
    if (!digests_.contains(name)) unused.push_back(name);
  }
  return unused;
}

absl::Status WeightLoader::CheckComputedParts() const {
  for (const std::string& name : UnusedTensors()) {
    // Old Llama files store the frequencies from which RoPE is computed. Tensors of whole numbers
    // or of truth values are masks and positions.
    if (absl::EndsWith(name, ".rotary_emb.inv_freq")) continue;
    if (IsMaskType(checkpoint_.tensors().find(name)->second.foreign_dtype)) continue;
    const bool computed =
        std::any_of(computed_.begin(), computed_.end(),
                    [&](const std::string& prefix) { return absl::StartsWith(name, prefix); });
    if (!computed) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " has no place in the model that config.json describes"));
  }
  return absl::OkStatus();
}

absl::Status WeightLoader::TransferStretch(const Stretch& stretch, void* staging) {
  const int64_t first = stretch.index * kDigestElements;
  const int64_t total = static_cast<int64_t>(stretch.source->bytes / SizeOf(stretch.source->dtype));
  const int64_t count = std::min(kDigestElements, total - first);
  const size_t source_size = SizeOf(stretch.source->dtype);
  const std::byte* source = stretch.source->data + static_cast<size_t>(first) * source_size;
  ConvertElements(stretch.source->dtype, source, dtype_, staging, count);
  *stretch.digest = DigestContent(source, static_cast<size_t>(count) * source_size);
  return device_.Upload(stretch.destination + static_cast<size_t>(first) * SizeOf(dtype_), staging,
                        static_cast<size_t>(count) * SizeOf(dtype_));
}

void WeightLoader::Work() {
  absl::StatusOr<DeviceBuffer> staging =
      device_.AllocateStaging(static_cast<size_t>(kDigestElements) * SizeOf(dtype_));
  absl::Status status = staging.status();
  while (status.ok()) {
    const size_t next = next_stretch_.fetch_add(1, std::memory_order_relaxed);
    if (next >= stretches_.size()) return;
    status = TransferStretch(stretches_[next], staging->data());
  }
  next_stretch_ = stretches_.size();  // the other workers stop too
  absl::MutexLock lock(&mu_);
  first_error_.Update(status);
}

absl::Status WeightLoader::Transfer() {
  PREFILLD_RETURN_IF_ERROR(placed_);
  PREFILLD_RETURN_IF_ERROR(CheckComputedParts());
  const int workers = std::min(kernels::cpu::AvailableThreads(), kMaxWorkers);
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < workers; ++i) threads.emplace_back([this] { Work(); });
  }
  absl::MutexLock lock(&mu_);
  PREFILLD_RETURN_IF_ERROR(first_error_);
  return device_.Synchronize();
}

void PlaceLayer(const ModelConfig& config, int layer, WeightLoader& loader, LayerWeights& weights) {
  const int64_t q_rows = int64_t{config.num_heads} * config.head_dim;
  const int64_t kv_rows = int64_t{config.num_kv_heads} * config.head_dim;
  loader.Computes(absl::StrCat("model.layers.", layer, "."));
  const auto place = [&](DeviceBuffer& buffer, std::vector<WeightLoader::Part> parts) {
    for (WeightLoader::Part& part : parts) {
      part.name = absl::StrCat("model.layers.", layer, ".", part.name);
    }
    loader.Place(buffer, parts);
  };

  place(weights.input_norm, {{"input_layernorm.weight", {config.hidden}}});
  place(weights.qkv, {{"self_attn.q_proj.weight", {q_rows, config.hidden}},
                      {"self_attn.k_proj.weight", {kv_rows, config.hidden}},
                      {"self_attn.v_proj.weight", {kv_rows, config.hidden}}});
  if (config.qkv_bias) {
    place(weights.qkv_bias, {{"self_attn.q_proj.bias", {q_rows}},
                             {"self_attn.k_proj.bias", {kv_rows}},
                             {"self_attn.v_proj.bias", {kv_rows}}});
  }
  if (config.qk_norm) {
    place(weights.q_norm, {{"self_attn.q_norm.weight", {config.head_dim}}});
    place(weights.k_norm, {{"self_attn.k_norm.weight", {config.head_dim}}});
  }
  place(weights.output, {{"self_attn.o_proj.weight", {config.hidden, q_rows}}});
  if (config.output_bias) {
    place(weights.output_bias, {{"self_attn.o_proj.bias", {config.hidden}}});
  }
  place(weights.post_norm, {{"post_attention_layernorm.weight", {config.hidden}}});
  place(weights.gate_up, {{"mlp.gate_proj.weight", {config.intermediate, config.hidden}},
                          {"mlp.up_proj.weight", {config.intermediate, config.hidden}}});
  place(weights.down, {{"mlp.down_proj.weight", {config.hidden, config.intermediate}}});
}

void PlaceModel(const ModelConfig& config, WeightLoader& loader, Weights& weights) {
  const std::vector<int64_t> table = {config.vocab_size, config.hidden};
  loader.Place(weights.embedding, {{"model.embed_tokens.weight", table}});
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  for (int layer = 0; layer < config.num_layers; ++layer) {
    PlaceLayer(config, layer, loader, weights.layers[static_cast<size_t>(layer)]);
  }
  loader.Place(weights.final_norm, {{"model.norm.weight", {config.hidden}}});
  loader.Computes("model.embed_tokens.");
  loader.Computes("model.norm.");
  if (config.tied_embeddings) {
    return;  // some files store the embedding twice, as lm_head.weight
  }
  loader.Place(weights.head, {{"lm_head.weight", table}});
  loader.Computes("lm_head.");
}

}  // namespace

absl::StatusOr<Weights> LoadWeights(const std::string& checkpoint_dir, const ModelConfig& config,
                                    Device& device) {
  PREFILLD_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(checkpoint_dir));
  Weights weights;
  WeightLoader loader(*checkpoint, device);
  PlaceModel(config, loader, weights);
  if (absl::Status status = loader.Transfer(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(checkpoint_dir, ": ", status.message()));
  }
  weights.fingerprint = loader.fingerprint(config);
  weights.unused_tensors = loader.UnusedTensors();
  return weights;
}

}  // namespace prefilld::model
