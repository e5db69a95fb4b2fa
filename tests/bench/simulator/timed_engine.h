// An engine that computes nothing and lets time pass instead, as much as a real one was measured to
// take.
#ifndef PREFILLD_TESTS_BENCH_SIMULATOR_TIMED_ENGINE_H_
#define PREFILLD_TESTS_BENCH_SIMULATOR_TIMED_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/device/device.h"
#include "model/prefill/prefill_engine.h"
#include "model/prefill/prefix_cache.h"
#include "server/prompt_speed.h"
#include "tests/bench/simulator/server_profile.h"

namespace prefilld::bench {

// Its prompts have no KV to send. It has a real engine's places for prompts, batches, points inside
// layers and index of a prefix cache.
class TimedEngine final : public model::PrefillEngine {
 public:
  // `pass` lets time pass. `prefix_cache_bytes` 0: there is no prefix cache.
  TimedEngine(const ServerProfile& profile, int64_t prefix_cache_bytes,
              std::function<void(absl::Duration)> pass);

  const model::EngineInfo& info() const override { return info_; }
  int kv_slots() const override { return 3; }
  size_t allocated_bytes() const override { return 0; }
  int64_t CachedTokens(const model::PromptInput& prompt) const override;
  int64_t max_batch_tokens() const override { return profile_.max_batch_tokens; }
  int64_t BatchTokens(int64_t num_tokens, const model::AttentionOptions& options) const override;
  bool MayInterject(int64_t num_tokens, const model::AttentionOptions& options) const override;
  bool CanStart(int64_t num_tokens) const override { return FreePlace(num_tokens) >= 0; }
  absl::StatusOr<std::unique_ptr<model::PrefillSequence>> Start(
      absl::Span<const model::PromptInput> prompts) override;
  absl::StatusOr<model::DeviceBuffer> AllocateStaging(size_t bytes) override;

 private:
  friend class TimedSequence;

  model::PrefixQuery QueryOf(const model::PromptInput& prompt) const;
  // Returns the smallest free place that holds so many tokens; -1: there is none.
  int FreePlace(int64_t num_tokens) const;
  // Returns the time of a layer that computes `num_computed` tokens behind `num_cached` others.
  absl::Duration LayerTime(model::AttentionPolicy policy, int64_t num_computed, int64_t num_cached,
                           bool is_last) const;
  // Returns what the first layer of a prompt of so many tokens takes beside its work: something if
  // no prompt before it was as long. From then on one was.
  absl::Duration FirstUse(model::AttentionPolicy policy, int64_t num_tokens);
  // Interpolates between the measured lengths.
  absl::Duration FirstTokenTime(model::AttentionPolicy policy, int64_t num_tokens) const;
  // Returns the times of a layer's parts, behind each of which there is a point.
  std::vector<absl::Duration> PartsOf(absl::Duration layer, int64_t num_computed) const;
  // Lets the time pass of the part that is queued, if there is one.
  void FinishPart();

  const ServerProfile profile_;
  const std::function<void(absl::Duration)> pass_;
  model::EngineInfo info_;
  server::StepCost layers_, last_layers_;
  // The measured times that depend on the length, of each policy by the number of tokens.
  using Times = std::map<model::AttentionPolicy, std::map<int64_t, absl::Duration>>;
  Times first_tokens_, first_uses_;
  std::set<int64_t> used_lengths_;  // those of prompts so far
  absl::Duration per_token_;        // of a layer, without attention
  // The part of an interrupted layer that the device computes while the host is at a point.
  std::function<void()> queued_;
  std::unique_ptr<model::Device> memory_;
  std::unique_ptr<model::PrefixCache> prefixes_;
  std::vector<bool> taken_;  // [places]
};

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_SIMULATOR_TIMED_ENGINE_H_
