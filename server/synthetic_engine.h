// An engine whose layers cost nothing, so that only the transfer of their KV takes time: what
// prefilld runs with --kv_bench_listen.
#ifndef PREFILLD_SERVER_SYNTHETIC_ENGINE_H_
#define PREFILLD_SERVER_SYNTHETIC_ENGINE_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "model/device/device.h"
#include "model/prefill/prefill_engine.h"

namespace prefilld::server {

// Has the KV of Llama-3.1-8B: 32 layers of 8 heads of 128 in bf16, 131,072 bytes a token.
class SyntheticEngine : public model::PrefillEngine {
 public:
  static absl::StatusOr<std::unique_ptr<SyntheticEngine>> Create(int64_t max_tokens);

  const model::EngineInfo& info() const override { return info_; }
  int kv_slots() const override { return 3; }
  size_t allocated_bytes() const override { return 0; }
  bool MayInterject(int64_t, const model::AttentionOptions&) const override { return false; }
  bool CanStart(int64_t) const override { return true; }
  // Packing is one copy out of a buffer of this content, as it would be from a finished layer's KV.
  absl::StatusOr<std::unique_ptr<model::PrefillSequence>> Start(
      absl::Span<const model::PromptInput> prompts) override;
  int64_t max_batch_tokens() const override { return 0; }
  int64_t BatchTokens(int64_t, const model::AttentionOptions&) const override { return 0; }
  absl::StatusOr<model::DeviceBuffer> AllocateStaging(size_t bytes) override;

 private:
  SyntheticEngine() = default;

  model::EngineInfo info_;
  std::unique_ptr<model::Device> device_;
  std::vector<uint8_t> kv_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SYNTHETIC_ENGINE_H_
