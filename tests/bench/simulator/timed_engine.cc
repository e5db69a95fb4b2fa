#include "tests/bench/simulator/timed_engine.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "model/prefill/packed_prompts.h"

namespace prefilld::bench {
namespace {

constexpr int kBlockTokens = 128;  // of attention patterns
// The share of the token-wise work that comes before attention: its projections, beside those
// behind it and the MLP.
constexpr double kBeforeAttention = 0.2;

// Returns the time of a length by a straight line between the measured ones, and beyond them that
// of the nearest.
absl::Duration TimeOf(const std::map<int64_t, absl::Duration>& times, int64_t num_tokens) {
  const auto above = times.lower_bound(num_tokens);
  if (above == times.end()) return times.empty() ? absl::ZeroDuration() : times.rbegin()->second;
  if (above == times.begin()) return above->second;
  const auto below = std::prev(above);
  const double way = static_cast<double>(num_tokens - below->first) /
                     static_cast<double>(above->first - below->first);
  return below->second + way * (above->second - below->second);
}

}  // namespace

class TimedSequence final : public model::PrefillSequence {
 public:
  TimedSequence(TimedEngine& engine, int place, int num_prompts, int64_t num_tokens,
                model::AttentionPolicy policy, model::PrefixLease lease)
      : engine_(engine),
        place_(place),
        num_prompts_(num_prompts),
        num_tokens_(num_tokens),
        num_cached_(lease.found_tokens()),
        policy_(policy),
        lease_(std::move(lease)) {
    engine_.taken_[static_cast<size_t>(place_)] = true;
  }
  ~TimedSequence() override { engine_.taken_[static_cast<size_t>(place_)] = false; }

  absl::StatusOr<model::LayerReport> RunLayer(absl::FunctionRef<bool()> at_point) override {
    const int64_t num_computed = num_tokens_ - num_cached_;
    const bool is_last = layer_ + 1 == engine_.profile_.num_layers && num_prompts_ == 1;
    const absl::Duration work = engine_.LayerTime(policy_, num_computed, num_cached_, is_last);
    const absl::Duration first_use =
        layer_ == 0 ? engine_.FirstUse(policy_, num_computed) : absl::ZeroDuration();
    const absl::Duration time = first_use + work;
    engine_.FinishPart();
    Pass(first_use);
    if (may_interject()) {
      Pass(work);
    } else {
      for (const absl::Duration part : engine_.PartsOf(work, num_computed)) {
        engine_.queued_ = [this, part] { Pass(part); };
        if (!engine_.profile_.queues_ahead) engine_.FinishPart();
        const bool goes_on = at_point();
        engine_.FinishPart();
        if (!goes_on) return absl::CancelledError("stopped inside a layer");
      }
    }
    model::LayerReport report;
    report.layer = layer_++;
    report.num_queries = is_last ? 1 : num_computed;
    report.density = 1.0;
    report.compute_us = absl::ToInt64Microseconds(time);
    return report;
  }
  bool may_interject() const override {
    return policy_ == model::AttentionPolicy::kDense &&
           num_tokens_ <= engine_.profile_.interject_tokens;
  }

  absl::Status PackKv(int, const model::KvSelection&, void*) override {
    return absl::InternalError("a simulated prompt has no KV");
  }
  void ReleaseKv(int) override {}

  absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() override {
    engine_.FinishPart();
    Pass(engine_.FirstTokenTime(policy_, num_tokens_));
    lease_.Publish();
    lease_.Reset();
    const auto vocab_size = static_cast<size_t>(engine_.info_.config.vocab_size);
    return std::vector<std::vector<float>>(static_cast<size_t>(num_prompts_),
                                           std::vector<float>(vocab_size, 0.0f));
  }
  absl::StatusOr<model::PromptLogprobs> Logprobs(int, int64_t) override {
    return absl::UnimplementedError("a simulated prompt has no log-probabilities");
  }

  model::AttentionPolicy policy() const override { return policy_; }
  int64_t cached_tokens() const override { return num_cached_; }
  double device_us() const override { return absl::ToDoubleMicroseconds(device_time_); }

 private:
  void Pass(absl::Duration time) {
    engine_.pass_(time);
    device_time_ += time;
  }

  TimedEngine& engine_;
  const int place_;
  const int num_prompts_;
  const int64_t num_tokens_;  // of all prompts
  const int64_t num_cached_;
  const model::AttentionPolicy policy_;
  model::PrefixLease lease_;
  int layer_ = 0;
  absl::Duration device_time_;
};

TimedEngine::TimedEngine(const ServerProfile& profile, int64_t prefix_cache_bytes,
                         std::function<void(absl::Duration)> pass)
    : profile_(profile),
      pass_(std::move(pass)),
      memory_(*model::CreateDevice(model::DeviceChoice::kCpu, 1)),
      taken_(profile.places.size()) {
  info_.model_name = "simulated";
  info_.fingerprint = "simulated";
  info_.device_name = "none";
  info_.native_dtype = kernels::DType::kBf16;
  info_.max_tokens = profile.max_tokens;
  info_.config.num_layers = profile.num_layers;
  info_.config.vocab_size = 256;
  info_.config.num_heads = info_.config.num_kv_heads = 1;
  info_.config.head_dim = 64;
  info_.default_attention.crossover_tokens = profile.crossover_tokens;
  for (const MeasuredPrompt& prompt : profile.prompts) {
    const absl::Duration layer = absl::Microseconds(prompt.layer_us);
    layers_.Record(prompt.policy, prompt.num_tokens, layer);
    last_layers_.Record(prompt.policy, prompt.num_tokens, absl::Microseconds(prompt.last_layer_us));
    first_tokens_[prompt.policy][prompt.num_tokens] = absl::Microseconds(prompt.first_token_us);
    first_uses_[prompt.policy][prompt.num_tokens] =
        absl::Microseconds(std::max(0.0, prompt.first_layer_us - prompt.layer_us));
    info_.layer_times.push_back({prompt.policy, prompt.num_tokens, prompt.layer_us});
  }
  per_token_ = absl::InfiniteDuration();
  for (const MeasuredPrompt& prompt : profile.prompts) {
    per_token_ = std::min(per_token_, absl::Microseconds(prompt.layer_us) / prompt.num_tokens);
  }
  const int64_t slots =
      profile.cache_block_bytes > 0 ? prefix_cache_bytes / profile.cache_block_bytes : 0;
  if (slots > 0) {
    prefixes_ = std::make_unique<model::PrefixCache>(slots, model::PrefixReuseRule::kLooser);
  }
}

absl::Duration TimedEngine::LayerTime(model::AttentionPolicy policy, int64_t num_computed,
                                      int64_t num_cached, bool is_last) const {
  const server::StepCost& costs = is_last ? last_layers_ : layers_;
  return costs.LayerBehind(policy, num_cached, num_computed);
}

absl::Duration TimedEngine::FirstUse(model::AttentionPolicy policy, int64_t num_tokens) {
  // Short prompts are padded, so they have few lengths.
  const int64_t padded = model::PackedPrompts::PaddedTokens(num_tokens);
  const bool is_padded =
      policy == model::AttentionPolicy::kDense && padded <= profile_.max_batch_tokens;
  if (!used_lengths_.insert(is_padded ? padded : num_tokens).second) return absl::ZeroDuration();
  const auto of_policy = first_uses_.find(policy);
  return of_policy == first_uses_.end() ? absl::ZeroDuration()
                                        : TimeOf(of_policy->second, num_tokens);
}

absl::Duration TimedEngine::FirstTokenTime(model::AttentionPolicy policy,
                                           int64_t num_tokens) const {
  const auto of_policy = first_tokens_.find(policy);
  return TimeOf(
      of_policy == first_tokens_.end() ? first_tokens_.begin()->second : of_policy->second,
      num_tokens);
}

std::vector<absl::Duration> TimedEngine::PartsOf(absl::Duration layer, int64_t num_computed) const {
  const absl::Duration by_token = std::min(layer, num_computed * per_token_);
  const int64_t tiles = kernels::CeilDiv(num_computed, profile_.part_tokens);
  const auto pieces = static_cast<int64_t>(std::ceil(
      absl::FDivDuration(layer - by_token, absl::Microseconds(profile_.attention_part_us))));
  std::vector<absl::Duration> parts(static_cast<size_t>(tiles),
                                    kBeforeAttention * by_token / tiles);
  parts.insert(parts.end(), static_cast<size_t>(pieces),
               pieces > 0 ? (layer - by_token) / pieces : absl::ZeroDuration());
  parts.insert(parts.end(), static_cast<size_t>(tiles),
               (1.0 - kBeforeAttention) * by_token / tiles);
  return parts;
}

void TimedEngine::FinishPart() {
  if (const auto part = std::exchange(queued_, nullptr)) part();
}

model::PrefixQuery TimedEngine::QueryOf(const model::PromptInput& prompt) const {
  model::AttentionOptions attention = prompt.attention;
  attention.policy =
      model::ResolvePolicy(attention, static_cast<int64_t>(prompt.tokens.size()), kBlockTokens);
  return {model::PrefixDomain(info_.fingerprint, 0, prompt.cache_salt), prompt.tokens, attention};
}

int64_t TimedEngine::CachedTokens(const model::PromptInput& prompt) const {
  return prefixes_ == nullptr ? 0 : prefixes_->CountUsable(QueryOf(prompt));
}

int64_t TimedEngine::BatchTokens(int64_t num_tokens, const model::AttentionOptions& options) const {
  const int64_t padded = model::PackedPrompts::PaddedTokens(num_tokens);
  const bool is_dense =
      model::ResolvePolicy(options, num_tokens, kBlockTokens) == model::AttentionPolicy::kDense;
  return is_dense && model::kFullBatchPrompts * padded <= profile_.max_batch_tokens ? padded : 0;
}

bool TimedEngine::MayInterject(int64_t num_tokens, const model::AttentionOptions& options) const {
  return model::ResolvePolicy(options, num_tokens, kBlockTokens) ==
             model::AttentionPolicy::kDense &&
         num_tokens <= profile_.interject_tokens;
}

int TimedEngine::FreePlace(int64_t num_tokens) const {
  int best = -1;
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (taken_[i] || profile_.places[i] < num_tokens) continue;
    if (best < 0 || profile_.places[i] < profile_.places[static_cast<size_t>(best)]) {
      best = static_cast<int>(i);
    }
  }
  return best;
}

absl::StatusOr<std::unique_ptr<model::PrefillSequence>> TimedEngine::Start(
    absl::Span<const model::PromptInput> prompts) {
  int64_t num_tokens = 0;
  for (const model::PromptInput& prompt : prompts) {
    const auto own = static_cast<int64_t>(prompt.tokens.size());
    num_tokens += prompts.size() == 1 ? own : model::PackedPrompts::PaddedTokens(own);
  }
  const int place = FreePlace(num_tokens);
  if (place < 0) return absl::ResourceExhaustedError("every place is taken");
  const model::PrefixQuery query = QueryOf(prompts.front());
  model::AttentionPolicy policy = query.attention.policy;
  model::PrefixLease lease;
  if (prompts.size() == 1 && prefixes_ != nullptr) {
    lease = prefixes_->Take(query);
    const int64_t computed = num_tokens - lease.found_tokens();
    if (lease.found_tokens() > 0 && computed <= 2 * kBlockTokens) {
      policy = model::AttentionPolicy::kDense;
    }
  }
  return std::make_unique<TimedSequence>(*this, place, static_cast<int>(prompts.size()), num_tokens,
                                         policy, std::move(lease));
}

absl::StatusOr<model::DeviceBuffer> TimedEngine::AllocateStaging(size_t bytes) {
  return memory_->AllocateStaging(bytes);
}

}  // namespace prefilld::bench
