// The prompt states of an engine, each free or taken.
#ifndef PREFILLD_MODEL_PREFILL_PROMPT_STATE_POOL_H_
#define PREFILLD_MODEL_PREFILL_PROMPT_STATE_POOL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "model/prefill/prompt_state.h"

namespace prefilld::model {

// A pool of prompt states. Thread-safe.
class PromptStatePool {
 public:
  // Adds a free state. Not to be called once Take has been.
  void Add(std::unique_ptr<PromptState> state);

  // Takes the smallest free state that holds so many tokens. If several are equal, it takes the one
  // that was added first, so that prompts that come one by one meet the same memory and its
  // recordings. RESOURCE_EXHAUSTED when none is free.
  absl::StatusOr<PromptState*> Take(int64_t num_tokens);

  // Tells whether Take would find a state.
  bool CanTake(int64_t num_tokens) const;

  // Frees a state and its KV slots. Work that is still queued for it must be ordered before
  // everything that its next user queues.
  void GiveBack(PromptState* state);

  int count() const;
  // Returns the state that holds most tokens.
  PromptState& largest();

 private:
  struct Entry {
    std::unique_ptr<PromptState> state;
    bool taken = false;
  };

  mutable absl::Mutex mu_;
  std::vector<Entry> entries_ ABSL_GUARDED_BY(mu_);  // ascending by max_tokens
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PROMPT_STATE_POOL_H_
