#include "server/synthetic_engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "proto/wire/bench_peer.h"

namespace prefilld::server {
namespace {

constexpr size_t kKvBytes = size_t{64} << 20;  // more than the caches hold

class SyntheticSequence : public model::PrefillSequence {
 public:
  SyntheticSequence(const model::ModelConfig& config, const std::vector<uint8_t>& kv)
      : config_(config), kv_(kv) {}

  bool may_interject() const override { return false; }
  absl::StatusOr<model::LayerReport> RunLayer(absl::FunctionRef<bool()>) override {
    model::LayerReport report;
    report.layer = next_layer_++;
    report.dense_heads = config_.num_heads;
    report.num_queries = 1;
    report.density = 1.0;
    return report;
  }

  absl::Status PackKv(int layer, const model::KvSelection& selection, void* dst) override {
    const auto bytes = static_cast<size_t>(model::PackedBytes(selection, config_.head_dim));
    // Each copy starts at another place of the buffer, so that its source is not in a cache.
    size_t offset = offset_.fetch_add(bytes) % kv_.size();
    for (size_t done = 0; done < bytes;) {
      const size_t chunk = std::min(bytes - done, kv_.size() - offset);
      std::memcpy(static_cast<uint8_t*>(dst) + done, kv_.data() + offset, chunk);
      done += chunk;
      offset = (offset + chunk) % kv_.size();
    }
    return absl::OkStatus();
  }

  void ReleaseKv(int layer) override {}

  absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() override {
    return std::vector<std::vector<float>>(1, std::vector<float>(config_.vocab_size, 0.0f));
  }

  absl::StatusOr<model::PromptLogprobs> Logprobs(int, int64_t) override {
    return absl::UnimplementedError("there is no model");
  }

  model::AttentionPolicy policy() const override { return model::AttentionPolicy::kDense; }
  double device_us() const override { return 0.0; }

 private:
  const model::ModelConfig& config_;
  const std::vector<uint8_t>& kv_;
  std::atomic<size_t> offset_ = 0;
  int next_layer_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<SyntheticEngine>> SyntheticEngine::Create(int64_t max_tokens) {
  std::unique_ptr<SyntheticEngine> engine(new SyntheticEngine);
  auto device = model::CreateDevice(model::DeviceChoice::kCpu, 1);
  if (!device.ok()) return device.status();
  engine->device_ = *std::move(device);
  engine->info_.model_name = "synthetic";
  engine->info_.fingerprint = wire::kKvBenchFingerprint;
  engine->info_.device_name = "none";
  engine->info_.native_dtype = kernels::DType::kBf16;
  engine->info_.max_tokens = max_tokens;
  model::ModelConfig& config = engine->info_.config;
  config.vocab_size = 256;
  config.num_layers = 32;
  config.num_heads = 32;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  config.max_positions = max_tokens;
  engine->kv_.resize(kKvBytes);
  for (size_t i = 0; i < kKvBytes; ++i) engine->kv_[i] = static_cast<uint8_t>(i * 131 + (i >> 12));
  return engine;
}

absl::StatusOr<std::unique_ptr<model::PrefillSequence>> SyntheticEngine::Start(
    absl::Span<const model::PromptInput> prompts) {
  return std::make_unique<SyntheticSequence>(info_.config, kv_);
}

absl::StatusOr<model::DeviceBuffer> SyntheticEngine::AllocateStaging(size_t bytes) {
  return device_->AllocateStaging(bytes);
}

}  // namespace prefilld::server
