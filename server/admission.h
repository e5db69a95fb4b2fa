// The rules of the queue, as plain functions: which prompts may wait, and which compute together.
//
// They read what they are given and change nothing, so that each rule can be tested by itself. The
// scheduler applies them under its lock.
#ifndef PREFILLD_SERVER_ADMISSION_H_
#define PREFILLD_SERVER_ADMISSION_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/sparse/attention_policy.h"
#include "server/prompt_speed.h"

namespace prefilld::server {

struct QueueLimits {
  int64_t capacity = 64;          // requests waiting beside the passes under way
  int64_t max_queued_tokens = 0;  // tokens waiting; one prompt may always wait
};

// The facts about a prompt that the rules read.
struct WaitingPrompt {
  int64_t num_tokens = 0;
  int64_t cached_tokens = 0;  // in the prefix cache: they cost no time worth counting
  int64_t batch_tokens = 0;   // what it takes of a batch's tokens; 0: it computes alone
  model::AttentionPolicy policy = model::AttentionPolicy::kAuto;  // that was asked for
  absl::Duration time_left = absl::InfiniteDuration();            // to its deadline
  bool ended = false;  // it waits no longer, and will leave the queue

  int64_t num_new_tokens() const { return num_tokens - cached_tokens; }
};

// The prompts that wait at one moment.
struct WaitingLine {
  std::vector<WaitingPrompt> prompts;  // in the order of their arrival
  bool computing = false;              // a pass is under way

  int64_t num_tokens() const;
};

// Returns RESOURCE_EXHAUSTED, naming the limit, when a prompt of `num_tokens` may not wait behind
// `line`.
absl::Status CheckRoom(const QueueLimits& limits, const WaitingLine& line, int64_t num_tokens);

// Tells when a caller who was refused for want of room should come back: after the time that the
// waiting tokens take at `tokens_per_second` (0: unknown), but within one second and one minute.
absl::Duration RetryDelay(const WaitingLine& line, double tokens_per_second);

// Returns DEADLINE_EXCEEDED when the time left to the newcomer's deadline is less than half of what
// the queue and its own prompt take at the best recent speed. Passes under way do not count,
// because they may end at any moment.
absl::Status CheckDeadline(const WaitingLine& line, const WaitingPrompt& newcomer,
                           const PromptSpeed& speed, absl::Time now);

// Estimates how long the newcomer waits at least, at the best recent speed. It overtakes prompts
// that take longer than it does. If it can be batched, it may also join the first pass of prompts
// like it, and so overtakes everyone behind them.
absl::Duration QueueAtBest(const WaitingLine& line, const WaitingPrompt& newcomer,
                           const PromptSpeed& speed, absl::Time now);

// Chooses the prompts that share a pass with the one at `head`, as ascending positions in the line;
// `head` is among them. If it can be batched, others that can be batched are taken in their order,
// as long as the batch has room for them and the deadlines of all in it allow, at the best recent
// speed.
std::vector<size_t> ChoosePass(absl::Span<const WaitingPrompt> line, size_t head,
                               int64_t max_batch_tokens, const PromptSpeed& speed, absl::Time now);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_ADMISSION_H_
