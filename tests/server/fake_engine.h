// An engine whose whole behaviour the test decides.
#ifndef PREFILLD_TESTS_SERVER_FAKE_ENGINE_H_
#define PREFILLD_TESTS_SERVER_FAKE_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/device/device.h"
#include "model/prefill/prefill_engine.h"
#include "model/prefill/prefix_cache.h"
#include "server/clock.h"

namespace prefilld::server {

struct FakeEngineOptions {
  int num_layers = 4;
  int num_kv_heads = 2;
  int head_dim = 64;
  int64_t vocab_size = 256;
  int64_t max_tokens = 1 << 20;
  int kv_slots = 3;
  int64_t max_batch_tokens = 0;
  int points_per_layer = 0;      // of sequences that may not interject
  int64_t interject_tokens = 0;  // dense sequences of at most so many may
  int max_sequences = 4;         // at once; Start answers RESOURCE_EXHAUSTED beyond
  // Prompts of more tokens, alone and with use_prefix_cache, have so many in the cache.
  int64_t cached_tokens = 0;
  // The slots of an index that nobody but the test uses (prefixes()). 0: there is none.
  int64_t prefix_slots = 0;
  size_t prefix_events = 64;                       // that it keeps
  std::vector<model::LayerTime> layer_times = {};  // as if measured at start
  // Only the last query of the last layer is computed if log-probabilities are not wanted.
  bool last_query_alone = false;
};

// The first token of a prompt is its last token plus one. K and V are a pure function of (layer, K
// or V, token, head, element), whatever the prompt: see ExpectedPayload. Dense prompts are batched,
// without padding.
class FakeSequence;

class FakeEngine final : public model::PrefillEngine {
 public:
  explicit FakeEngine(const FakeEngineOptions& options);

  // Makes every layer take this long from now on. It can be stopped within.
  void set_layer_time(absl::Duration time);
  // Sets a function that is called in every layer, and in every part of log-probabilities, from now
  // on, by the thread that computes it, with the tokens of all prompts of the sequence. A test
  // advances its clock there.
  void set_on_layer(std::function<void(int64_t num_tokens)> on_layer);
  // Sets a function that is called before a layer that is computed at a point of another one: it is
  // the rest of the part before the point, for which a device would let the layer wait. A test
  // advances its clock there.
  void set_on_part_before(std::function<void()> on_part_before);
  // Sets the clock of the device, which is real time without it. Borrowed.
  void set_clock(const Clock* clock) { clock_ = clock; }
  // Makes layers fail with `status` from `layer` on. -1: never.
  void FailFrom(int layer, absl::Status status);
  void FailPacking(absl::Status status);
  // Sets what runs whenever a frame is packed, on the thread that packs it, before a failure.
  void set_on_pack(std::function<void()> on_pack);
  // Stops every sequence after its first `layers` layers until the next call. -1: no limit. The
  // layer that is stopped has begun and takes that long.
  void HoldAfter(int layers);
  void set_logits_are_nan(bool nan) { logits_are_nan_ = nan; }
  void set_refuses_batches(bool refuses) { refuses_batches_ = refuses; }
  // Stops every prompt's log-probabilities, which are computed in kLogprobsParts parts, after the
  // first `parts` until the next call. -1: no limit.
  static constexpr int kLogprobsParts = 4;
  void HoldLogprobsAfter(int parts);
  // Makes the second part fail from now on.
  void FailLogprobs(absl::Status status);

  int started() const { return started_; }                // sequences started so far
  int alive() const { return alive_; }                    // sequences that exist now
  int layers_run() const { return layers_run_; }          // over all sequences
  int stopped() const { return stopped_; }                // sequences that a Hold… keeps now
  int held() const { return held_; }                      // unreleased layers now
  int most_held() const { return most_held_; }            // most unreleased layers at any time
  int cached_packs() const { return cached_packs_; }      // frames packed by PackCachedKv
  int logprobs_parts() const { return logprobs_parts_; }  // over all sequences
  int asked_for_gauges() const {
    return asked_for_gauges_;
  }                                                   // once in each of the watchdog's rounds
  std::vector<std::vector<int64_t>> lengths() const;  // for every sequence so far
  std::string last_salt() const;                      // of the latest sequence's first prompt
  std::vector<uint32_t> last_tokens() const;          // for the latest sequence's first prompt
  model::AttentionOptions last_attention() const;     // for the latest sequence's first prompt

  const model::EngineInfo& info() const override { return info_; }
  int kv_slots() const override { return options_.kv_slots; }
  size_t allocated_bytes() const override { return 12345; }
  model::ResidentTokens resident_tokens() const override {
    ++asked_for_gauges_;
    return {.used = 678, .limit = 9000};
  }
  int64_t max_batch_tokens() const override { return options_.max_batch_tokens; }
  int64_t BatchTokens(int64_t num_tokens, const model::AttentionOptions& options) const override;
  bool MayInterject(int64_t num_tokens, const model::AttentionOptions& options) const override;
  int64_t CachedTokens(const model::PromptInput& prompt) const override;
  model::PrefixCacheUse prefix_cache() const override;
  const model::PrefixCache* prefix_index() const override { return prefixes_.get(); }
  model::PrefixCache& prefixes() { return *prefixes_; }
  bool CanStart(int64_t) const override { return alive_ < options_.max_sequences; }
  absl::StatusOr<std::unique_ptr<model::PrefillSequence>> Start(
      absl::Span<const model::PromptInput> prompts) override;
  absl::StatusOr<model::DeviceBuffer> AllocateStaging(size_t bytes) override;

 private:
  friend class FakeSequence;

  const FakeEngineOptions options_;
  model::EngineInfo info_;
  std::unique_ptr<model::Device> memory_;  // for staging alone
  std::unique_ptr<model::PrefixCache> prefixes_;
  const Clock* clock_ = &Clock::Real();
  FakeSequence* interrupted_ = nullptr;  // at a point of its layer; the compute thread's

  std::atomic<int> started_ = 0, alive_ = 0, layers_run_ = 0, held_ = 0, most_held_ = 0;
  std::atomic<int> stopped_ = 0, cached_packs_ = 0;
  std::atomic<int> logprobs_parts_ = 0;
  mutable std::atomic<int> asked_for_gauges_ = 0;
  std::atomic<bool> logits_are_nan_ = false;
  std::atomic<bool> refuses_batches_ = false;
  mutable absl::Mutex mu_;
  absl::Duration layer_time_ ABSL_GUARDED_BY(mu_);
  std::function<void(int64_t)> on_layer_ ABSL_GUARDED_BY(mu_);
  std::function<void()> on_part_before_ ABSL_GUARDED_BY(mu_);
  std::function<void()> on_pack_ ABSL_GUARDED_BY(mu_);
  int fail_from_ ABSL_GUARDED_BY(mu_) = -1;
  absl::Status layer_error_ ABSL_GUARDED_BY(mu_);
  absl::Status pack_error_ ABSL_GUARDED_BY(mu_);
  int hold_after_ ABSL_GUARDED_BY(mu_) = -1;
  int hold_logprobs_after_ ABSL_GUARDED_BY(mu_) = -1;
  absl::Status logprobs_error_ ABSL_GUARDED_BY(mu_);
  std::vector<std::vector<int64_t>> lengths_ ABSL_GUARDED_BY(mu_);
  std::string last_salt_ ABSL_GUARDED_BY(mu_);
  std::vector<uint32_t> last_tokens_ ABSL_GUARDED_BY(mu_);
  model::AttentionOptions last_attention_ ABSL_GUARDED_BY(mu_);
};

// Returns the bytes that the fake packs for these blocks.
std::string ExpectedPayload(int layer, const model::KvSelection& selection, int64_t num_tokens,
                            int head_dim);

}  // namespace prefilld::server

#endif  // PREFILLD_TESTS_SERVER_FAKE_ENGINE_H_
