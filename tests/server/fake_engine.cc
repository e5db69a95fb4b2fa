#include "tests/server/fake_engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/time/clock.h"

namespace prefilld::server {
namespace {

// Makes the value of one element, in as many bytes as the dtype has.
uint32_t Element(int layer, bool is_value, int64_t token, int head, int element) {
  return static_cast<uint32_t>(layer * 1000003 + (is_value ? 500009 : 0) + token * 8191 +
                               head * 131 + element);
}

// Packs the blocks [first, end) of `tensors`: false is K and true is V.
char* PackBlocks(int layer, const model::KvSelection& s, int64_t first, int64_t end,
                 std::initializer_list<bool> tensors, int64_t num_tokens, int head_dim, char* dst) {
  const size_t bytes = s.scales == kernels::KvScales::kNone ? kernels::SizeOf(s.dtype) : 1;
  const bool by_token = s.order == kernels::KvOrder::kNhd || s.order == kernels::KvOrder::kNh2d;
  const int outer = by_token ? s.block_tokens : s.num_heads;
  const int inner = by_token ? s.num_heads : s.block_tokens;
  for (int64_t block = first; block < end; ++block) {
    for (int i = 0; i < outer; ++i) {
      for (int j = 0; j < inner; ++j) {
        const int head = s.first_head + (by_token ? j : i);
        const int64_t token = block * s.block_tokens + (by_token ? i : j);
        for (const bool is_value : tensors) {
          for (int e = 0; e < head_dim; ++e, dst += bytes) {
            const uint32_t value =
                token < num_tokens ? Element(layer, is_value, token, head, e) : 0;
            std::memcpy(dst, &value, bytes);
          }
        }
      }
    }
  }
  return dst;
}

char* PackArray(int layer, const model::KvSelection& s, int64_t num_tokens, int head_dim,
                char* dst) {
  const int64_t end = s.first_block + s.num_blocks;
  if (kernels::IsInterleaved(s.order)) {
    return PackBlocks(layer, s, s.first_block, end, {false, true}, num_tokens, head_dim, dst);
  }
  dst = PackBlocks(layer, s, s.first_block, end, {false}, num_tokens, head_dim, dst);
  return PackBlocks(layer, s, s.first_block, end, {true}, num_tokens, head_dim, dst);
}

void Pack(int layer, const model::KvSelection& s, int64_t num_tokens, int head_dim, char* dst) {
  dst = PackArray(layer, s, num_tokens, head_dim, dst);
  if (s.scales == kernels::KvScales::kNone) return;
  model::KvSelection scales = s;
  scales.scales = kernels::KvScales::kNone;
  scales.dtype = kernels::DType::kFp32;
  if (s.scales == kernels::KvScales::kPerBlock) {
    scales.block_tokens = 1;
    num_tokens = (num_tokens + s.block_tokens - 1) / s.block_tokens;
  }
  PackArray(layer, scales, num_tokens, /*head_dim=*/1, dst);
}

model::AttentionPolicy Resolve(const model::AttentionOptions& options, int64_t num_tokens) {
  using model::AttentionPolicy;
  const bool shares =
      options.policy == AttentionPolicy::kShare ||
      (options.policy == AttentionPolicy::kAuto && num_tokens >= options.crossover_tokens);
  if (shares) return AttentionPolicy::kShare;
  return options.policy == AttentionPolicy::kVerticalSlash ? options.policy
                                                           : AttentionPolicy::kDense;
}

}  // namespace

class FakeSequence final : public model::PrefillSequence {
 public:
  FakeSequence(FakeEngine* engine, absl::Span<const model::PromptInput> prompts) : engine_(engine) {
    for (const model::PromptInput& prompt : prompts) {
      prompts_.push_back({static_cast<int64_t>(prompt.tokens.size()), prompt.tokens.back()});
      num_tokens_ += prompts_.back().num_tokens;
    }
    const model::AttentionOptions& options = prompts.front().attention;
    policy_ = Resolve(options, prompts_.front().num_tokens);
    audited_ = options.recall_audit_rows > 0;
    logprobs_ = prompts.front().logprobs;
    if (prompts.size() == 1) cached_tokens_ = engine_->CachedTokens(prompts.front());
    ++engine_->alive_;
    ++engine_->started_;
  }
  ~FakeSequence() override {
    engine_->held_ -= held_;
    --engine_->alive_;
  }

  bool may_interject() const override {
    return policy_ == model::AttentionPolicy::kDense &&
           num_tokens_ <= engine_->options_.interject_tokens;
  }

  absl::StatusOr<model::LayerReport> RunLayer(absl::FunctionRef<bool()> listener) override {
    absl::Duration time;
    std::function<void(int64_t)> on_layer;
    std::function<void()> on_part_before;
    {
      absl::MutexLock lock(&engine_->mu_);
      const auto may_run = [this]() ABSL_SHARED_LOCKS_REQUIRED(engine_->mu_) {
        return engine_->hold_after_ < 0 || layer_ < engine_->hold_after_;
      };
      StartClock();
      ++engine_->stopped_;
      engine_->mu_.Await(absl::Condition(&may_run));
      --engine_->stopped_;
      StopClock();
      if (engine_->fail_from_ >= 0 && layer_ >= engine_->fail_from_) return engine_->layer_error_;
      time = engine_->layer_time_;
      on_layer = engine_->on_layer_;
      on_part_before = engine_->on_part_before_;
    }
    FakeSequence* const interrupted = engine_->interrupted_;
    if (interrupted != nullptr && on_part_before != nullptr) {
      interrupted->StartClock();
      on_part_before();
      interrupted->StopClock();
    }
    StartClock();
    const absl::Cleanup stop_clock = [this] { StopClock(); };
    const auto at_point = [&] {
      StopClock();
      engine_->interrupted_ = this;
      const bool go_on = listener();
      engine_->interrupted_ = interrupted;
      StartClock();
      return go_on;
    };
    const absl::Time until = absl::Now() + time;
    while (absl::Now() < until) {
      if (!at_point()) return absl::CancelledError("stopped inside a layer");
      absl::SleepFor(std::min(until - absl::Now(), absl::Milliseconds(5)));
    }
    if (on_layer != nullptr) on_layer(num_tokens_);
    for (int i = 0; i < engine_->options_.points_per_layer && !may_interject(); ++i) {
      if (!at_point()) return absl::CancelledError("stopped inside a layer");
    }
    ++held_;
    const int held = ++engine_->held_;
    engine_->most_held_ = std::max<int>(engine_->most_held_, held);
    ++engine_->layers_run_;
    model::LayerReport report;
    report.layer = layer_++;
    report.dense_heads = policy_ == model::AttentionPolicy::kDense ? 4 : 0;
    report.pivot_heads = 4 - report.dense_heads > 0 ? 1 : 0;
    report.shared_heads = 4 - report.dense_heads > 0 ? 3 : 0;
    const bool alone = engine_->options_.last_query_alone && !logprobs_ && prompts_.size() == 1;
    const bool is_last = layer_ == engine_->options_.num_layers;
    report.num_queries = alone && is_last ? 1 : prompts_.front().num_tokens;
    report.density = policy_ == model::AttentionPolicy::kDense ? 1.0 : 0.25;
    report.compute_us = absl::ToInt64Microseconds(time) + 1;
    // Heads 1 to 3 of layer l have recalls 0.9, 0.91 and 0.92, less l / 10.
    for (int head = 1; audited_ && head <= report.shared_heads; ++head) {
      const auto recall = static_cast<float>(0.89 + 0.01 * head - 0.1 * report.layer);
      report.recall.push_back({report.layer, head, model::PatternSource::kPivot, recall});
      report.audit_us = 500;
    }
    return report;
  }

  absl::Status PackCachedKv(int layer, const model::KvSelection& selection, void* dst) override {
    const int64_t end = selection.first_block + selection.num_blocks;
    if (end * selection.block_tokens > cached_tokens_) return absl::InternalError("not cached");
    ++engine_->cached_packs_;
    return PackKv(layer, selection, dst);
  }

  absl::Status PackKv(int layer, const model::KvSelection& selection, void* dst) override {
    std::function<void()> on_pack;
    {
      absl::MutexLock lock(&engine_->mu_);
      on_pack = engine_->on_pack_;
    }
    if (on_pack != nullptr) on_pack();
    {
      absl::MutexLock lock(&engine_->mu_);
      if (!engine_->pack_error_.ok()) return engine_->pack_error_;
    }
    Pack(layer, selection, prompts_[selection.prompt].num_tokens, engine_->options_.head_dim,
         static_cast<char*>(dst));
    return absl::OkStatus();
  }

  void ReleaseKv(int layer) override {
    --held_;
    --engine_->held_;
  }

  absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() override {
    std::vector<std::vector<float>> all;
    for (const FakePrompt& prompt : prompts_) {
      std::vector<float>& logits = all.emplace_back(engine_->options_.vocab_size, 0.0f);
      logits[(prompt.last_token + 1) % logits.size()] = 5.0f;
      if (engine_->logits_are_nan_) logits.assign(logits.size(), NAN);
    }
    return all;
  }

  // Entry i has minus i for the token, and half of that for the likeliest.
  absl::StatusOr<model::PromptLogprobs> Logprobs(int prompt, int64_t first) override {
    const int64_t count = prompts_[prompt].num_tokens - 1;
    const auto end_of = [count](int part) {
      return (part + 1) * count / FakeEngine::kLogprobsParts;
    };
    int part = 0;
    while (end_of(part) <= first && part + 1 < FakeEngine::kLogprobsParts) ++part;
    std::function<void(int64_t)> on_layer;
    {
      absl::MutexLock lock(&engine_->mu_);
      const auto may_run = [this, part]() ABSL_SHARED_LOCKS_REQUIRED(engine_->mu_) {
        return engine_->hold_logprobs_after_ < 0 || part < engine_->hold_logprobs_after_;
      };
      ++engine_->stopped_;
      engine_->mu_.Await(absl::Condition(&may_run));
      --engine_->stopped_;
      if (part == 1 && !engine_->logprobs_error_.ok()) return engine_->logprobs_error_;
      on_layer = engine_->on_layer_;
    }
    StartClock();
    if (on_layer != nullptr) on_layer(num_tokens_);
    StopClock();
    ++engine_->logprobs_parts_;
    model::PromptLogprobs logprobs;
    for (int64_t i = first; i < end_of(part); ++i) {
      logprobs.of_token.push_back(-static_cast<float>(i));
      logprobs.of_best.push_back(-0.5f * static_cast<float>(i));
    }
    return logprobs;
  }

  model::AttentionPolicy policy() const override { return policy_; }
  int64_t cached_tokens() const override { return cached_tokens_; }
  double device_us() const override { return absl::ToDoubleMicroseconds(device_time_); }

 private:
  void StartClock() { started_at_ = engine_->clock_->Now(); }
  void StopClock() { device_time_ += engine_->clock_->Now() - started_at_; }

  struct FakePrompt {
    int64_t num_tokens;
    uint32_t last_token;
  };

  FakeEngine* const engine_;
  std::vector<FakePrompt> prompts_;
  int64_t num_tokens_ = 0;  // of all prompts
  model::AttentionPolicy policy_;
  int64_t cached_tokens_ = 0;
  bool audited_, logprobs_;
  int layer_ = 0;
  absl::Time started_at_;
  absl::Duration device_time_;
  std::atomic<int> held_ = 0;
};

FakeEngine::FakeEngine(const FakeEngineOptions& options)
    : options_(options), memory_(*model::CreateDevice(model::DeviceChoice::kCpu, 1)) {
  info_.config.vocab_size = options.vocab_size;
  info_.config.num_layers = options.num_layers;
  info_.config.num_heads = 4;
  info_.config.num_kv_heads = options.num_kv_heads;
  info_.config.head_dim = options.head_dim;
  info_.config.eos_token_ids = {2};
  info_.model_name = "fake";
  info_.fingerprint = "0123456789abcdef0123456789abcdef";
  info_.device_name = "fake device";
  info_.native_dtype = kernels::DType::kBf16;
  info_.max_tokens = options.max_tokens;
  info_.layer_times = options.layer_times;
  if (options.prefix_slots > 0) {
    prefixes_ =
        std::make_unique<model::PrefixCache>(options.prefix_slots, model::PrefixReuseRule::kLooser,
                                             model::Xxh3PrefixHash, options.prefix_events);
  }
}

void FakeEngine::set_layer_time(absl::Duration time) {
  absl::MutexLock lock(&mu_);
  layer_time_ = time;
}

void FakeEngine::set_on_layer(std::function<void(int64_t)> on_layer) {
  absl::MutexLock lock(&mu_);
  on_layer_ = std::move(on_layer);
}

void FakeEngine::set_on_part_before(std::function<void()> on_part_before) {
  absl::MutexLock lock(&mu_);
  on_part_before_ = std::move(on_part_before);
}

void FakeEngine::FailFrom(int layer, absl::Status status) {
  absl::MutexLock lock(&mu_);
  fail_from_ = layer;
  layer_error_ = std::move(status);
}

void FakeEngine::FailPacking(absl::Status status) {
  absl::MutexLock lock(&mu_);
  pack_error_ = std::move(status);
}

void FakeEngine::set_on_pack(std::function<void()> on_pack) {
  absl::MutexLock lock(&mu_);
  on_pack_ = std::move(on_pack);
}

void FakeEngine::HoldAfter(int layers) {
  absl::MutexLock lock(&mu_);
  hold_after_ = layers;
}

void FakeEngine::HoldLogprobsAfter(int parts) {
  absl::MutexLock lock(&mu_);
  hold_logprobs_after_ = parts;
}

void FakeEngine::FailLogprobs(absl::Status status) {
  absl::MutexLock lock(&mu_);
  logprobs_error_ = std::move(status);
}

std::vector<std::vector<int64_t>> FakeEngine::lengths() const {
  absl::MutexLock lock(&mu_);
  return lengths_;
}

std::vector<uint32_t> FakeEngine::last_tokens() const {
  absl::MutexLock lock(&mu_);
  return last_tokens_;
}

model::AttentionOptions FakeEngine::last_attention() const {
  absl::MutexLock lock(&mu_);
  return last_attention_;
}

bool FakeEngine::MayInterject(int64_t num_tokens, const model::AttentionOptions& options) const {
  return Resolve(options, num_tokens) == model::AttentionPolicy::kDense &&
         num_tokens <= options_.interject_tokens;
}

int64_t FakeEngine::CachedTokens(const model::PromptInput& prompt) const {
  const auto num_tokens = static_cast<int64_t>(prompt.tokens.size());
  return prompt.use_prefix_cache && num_tokens > options_.cached_tokens ? options_.cached_tokens
                                                                        : 0;
}

// A block of 1000 bytes for every layer run.
model::PrefixCacheUse FakeEngine::prefix_cache() const {
  if (options_.cached_tokens == 0) return {};
  const int64_t layers = layers_run_;
  return {.counts = {.lookups = layers,
                     .hits = layers,
                     .hit_tokens = 128 * layers,
                     .stored_blocks = layers,
                     .used_slots = layers,
                     .num_slots = 1000},
          .block_bytes = 1000,
          .load_seconds = 0.5};
}

std::string FakeEngine::last_salt() const {
  absl::MutexLock lock(&mu_);
  return last_salt_;
}

int64_t FakeEngine::BatchTokens(int64_t num_tokens, const model::AttentionOptions& options) const {
  const bool is_dense = Resolve(options, num_tokens) == model::AttentionPolicy::kDense;
  return is_dense && num_tokens <= options_.max_batch_tokens ? num_tokens : 0;
}

absl::StatusOr<std::unique_ptr<model::PrefillSequence>> FakeEngine::Start(
    absl::Span<const model::PromptInput> prompts) {
  if (alive_ >= options_.max_sequences) {
    return absl::ResourceExhaustedError("no more sequences at once");
  }
  if (refuses_batches_ && prompts.size() > 1) return absl::InvalidArgumentError("no batches");
  absl::MutexLock lock(&mu_);
  std::vector<int64_t>& lengths = lengths_.emplace_back();
  for (const model::PromptInput& prompt : prompts) {
    lengths.push_back(static_cast<int64_t>(prompt.tokens.size()));
  }
  last_salt_ = std::string(prompts.front().cache_salt);
  last_tokens_.assign(prompts.front().tokens.begin(), prompts.front().tokens.end());
  last_attention_ = prompts.front().attention;
  return std::make_unique<FakeSequence>(this, prompts);
}

absl::StatusOr<model::DeviceBuffer> FakeEngine::AllocateStaging(size_t bytes) {
  return memory_->AllocateStaging(bytes);
}

std::string ExpectedPayload(int layer, const model::KvSelection& selection, int64_t num_tokens,
                            int head_dim) {
  std::string payload(static_cast<size_t>(model::PackedBytes(selection, head_dim)), '\0');
  Pack(layer, selection, num_tokens, head_dim, payload.data());
  return payload;
}

}  // namespace prefilld::server
