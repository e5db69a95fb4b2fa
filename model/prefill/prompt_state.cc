#include "model/prefill/prompt_state.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::model {

PromptState::PromptState(const PromptStateParts& parts, int64_t max_tokens, int first_mark)
    : max_tokens(max_tokens),
      first_mark(first_mark),
      dense(parts.device, parts.points, parts.config->num_heads, /*pattern=*/nullptr,
            first_mark + 2 * kNumPoints) {
  if (parts.baseline != nullptr) baseline = std::make_unique<BaselineAttention>(parts.baseline);
}

absl::StatusOr<std::unique_ptr<PromptState>> PromptState::Create(const PromptStateParts& parts,
                                                                 int64_t max_tokens,
                                                                 int first_mark) {
  Device* device = parts.device;
  const ModelConfig& config = *parts.config;
  auto state = std::make_unique<PromptState>(parts, max_tokens, first_mark);
  const int64_t batch_tokens = std::min(max_tokens, parts.max_batch_tokens);
  PREFILLD_ASSIGN_OR_RETURN(state->hidden,
                            HiddenStates::Create(device, config, max_tokens, batch_tokens));
  const int64_t slot_elements =
      RoundUp(max_tokens, kKvStrideTokens) * config.num_kv_heads * config.head_dim;
  PREFILLD_ASSIGN_OR_RETURN(
      state->slots,
      KvSlots::Create(device, parts.kv_slots,
                      slot_elements * kernels::SizeOf(device->traits().compute_dtype)));
  PREFILLD_ASSIGN_OR_RETURN(
      state->sharing,
      PatternSharing::Create(parts.sharing, std::min(max_tokens, parts.max_prompt_tokens)));
  if (batch_tokens > 0) {
    const int64_t blocks = kernels::CeilDiv(batch_tokens, parts.block_tokens);
    PREFILLD_ASSIGN_OR_RETURN(
        state->batch_pattern,
        device->Allocate(blocks * kernels::PatternWords(blocks) * sizeof(uint32_t)));
    // A batch is no prompt alone, so it may use the same marks.
    state->batch = std::make_unique<DenseStrategy>(device, parts.points, config.num_heads,
                                                   state->batch_pattern.as<uint32_t>(),
                                                   first_mark + 2 * kNumPoints);
  }
  return state;
}

void PromptState::Start(PackedPrompts next, const AttentionOptions& attention, bool with_logprobs,
                        PrefixLease prefix_lease) {
  prompts = std::move(next);
  options = attention;
  logprobs = with_logprobs;
  prefix = std::move(prefix_lease);
  loading.reset();
  started_layers = next_layer = 0;
  failure = absl::OkStatus();
  dense.StartPrompt(num_computed(), options);
  if (&strategy() != &dense) strategy().StartPrompt(num_tokens(), options);
}

AttentionStrategy& PromptState::strategy() {
  if (is_batch()) return *batch;
  if (IsBaseline(options.policy)) return *baseline;
  if (options.policy == AttentionPolicy::kDense) return dense;
  return *sharing;
}

void PromptStatePool::Add(std::unique_ptr<PromptState> state) {
  absl::MutexLock lock(&mu_);
  const auto place = std::upper_bound(
      entries_.begin(), entries_.end(), state->max_tokens,
      [](int64_t max_tokens, const Entry& entry) { return max_tokens < entry.state->max_tokens; });
  entries_.insert(place, {.state = std::move(state)});
}

absl::StatusOr<PromptState*> PromptStatePool::Take(int64_t num_tokens) {
  absl::MutexLock lock(&mu_);
  int fitting = 0;
  for (Entry& entry : entries_) {
    if (entry.state->max_tokens < num_tokens) continue;
    ++fitting;
    if (std::exchange(entry.taken, true)) continue;
    entry.num_tokens = num_tokens;
    return entry.state.get();
  }
  return absl::ResourceExhaustedError(
      absl::StrCat("no memory is free for ", num_tokens, " tokens: other prompts have all ",
                   fitting, " places that hold so many, of ", entries_.size()));
}

bool PromptStatePool::CanTake(int64_t num_tokens) const {
  absl::MutexLock lock(&mu_);
  return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
    return !entry.taken && entry.state->max_tokens >= num_tokens;
  });
}

void PromptStatePool::GiveBack(PromptState* state) {
  state->slots->ReleaseAll();
  absl::MutexLock lock(&mu_);
  for (Entry& entry : entries_) {
    if (entry.state.get() == state) entry.taken = false;
  }
}

ResidentTokens PromptStatePool::resident_tokens() const {
  ResidentTokens tokens;
  absl::MutexLock lock(&mu_);
  for (const Entry& entry : entries_) {
    tokens.limit += entry.state->max_tokens;
    if (entry.taken) tokens.used += entry.num_tokens;
  }
  return tokens;
}

int PromptStatePool::count() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int>(entries_.size());
}

PromptState& PromptStatePool::largest() {
  absl::MutexLock lock(&mu_);
  return *entries_.back().state;
}

}  // namespace prefilld::model
