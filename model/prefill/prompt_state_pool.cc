#include "model/prefill/prompt_state_pool.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld::model {

void PromptStatePool::Add(std::unique_ptr<PromptState> state) {
  absl::MutexLock lock(&mu_);
  const auto place = std::upper_bound(
      entries_.begin(), entries_.end(), state->max_tokens,
      [](int64_t max_tokens, const Entry& entry) { return max_tokens < entry.state->max_tokens; });
  entries_.insert(place, {std::move(state), false});
}

absl::StatusOr<PromptState*> PromptStatePool::Take(int64_t num_tokens) {
  absl::MutexLock lock(&mu_);
  int fitting = 0;
  for (Entry& entry : entries_) {
    if (entry.state->max_tokens < num_tokens) continue;
    ++fitting;
    if (std::exchange(entry.taken, true)) continue;
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

int PromptStatePool::count() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int>(entries_.size());
}

PromptState& PromptStatePool::largest() {
  absl::MutexLock lock(&mu_);
  return *entries_.back().state;
}

}  // namespace prefilld::model
