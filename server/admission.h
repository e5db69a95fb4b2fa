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
#include "server/tenants.h"

namespace prefilld::server {

struct QueueLimits {
  int64_t capacity = 64;          // requests waiting beside the passes under way
  int64_t max_queued_tokens = 0;  // tokens waiting; one prompt of each tenant may always wait
  std::vector<Tenant> tenants = {Tenant()};  // who shares the queue
};

// The facts about a prompt that the rules read.
struct WaitingPrompt {
  int64_t num_tokens = 0;
  int64_t cached_tokens = 0;  // in the prefix cache: they cost no time worth counting
  int64_t batch_tokens = 0;   // what it takes of a batch's tokens; 0: it computes alone
  model::AttentionPolicy policy = model::AttentionPolicy::kAuto;  // that was asked for
  absl::Duration time_left = absl::InfiniteDuration();            // to its deadline
  bool ended = false;  // it waits no longer, and will leave the queue
  int tenant = 0;      // its position among the tenants
  int priority = 0;    // its class
  absl::Duration tenant_time = absl::ZeroDuration();  // as in Contender (turns.h)

  int64_t num_new_tokens() const { return num_tokens - cached_tokens; }
};

// The prompts that wait at one moment.
struct WaitingLine {
  std::vector<WaitingPrompt> prompts;  // in the order of their arrival
  bool computing = false;              // a pass is under way

  int64_t TokensOf(int tenant) const;
};

// Returns RESOURCE_EXHAUSTED, naming the limit, when the newcomer may not wait behind `line`.
//
// Where there are several tenants, half of the queue is divided among them by their weights, each
// getting a place at least, so that nobody finds it filled up by another. The other half is there
// for whoever comes first. So with more tenants than half of the places more requests can wait than
// `capacity`: one of each tenant.
absl::Status CheckRoom(const QueueLimits& limits, const WaitingLine& line,
                       const WaitingPrompt& newcomer);

// Tells when a caller who was refused for want of room should come back: after the time that the
// waiting tokens of its own tenant take at `tokens_per_second` (0: unknown) times the tenant's
// share among those that wait, but within one second and one minute.
absl::Duration RetryDelay(const QueueLimits& limits, const WaitingLine& line, int tenant,
                          double tokens_per_second);

// Returns DEADLINE_EXCEEDED when the time left to the newcomer's deadline is less than half of what
// the queue and its own prompt take at the best recent speed. Passes under way do not count,
// because they may end at any moment.
absl::Status CheckDeadline(const WaitingLine& line, const WaitingPrompt& newcomer,
                           const PromptSpeed& speed, absl::Time now);

// Estimates how long the newcomer waits at least, at the best recent speed. It overtakes prompts
// that take longer than it does, those of lower classes and, as its tenant's turn may be the next,
// those of other tenants in its class. If it can be batched, it may also join the first pass of
// prompts like it, and so overtakes everyone behind them.
absl::Duration QueueAtBest(const WaitingLine& line, const WaitingPrompt& newcomer,
                           const PromptSpeed& speed, absl::Time now);

// Chooses the prompts that share a pass with the one at `head`, as ascending positions in the line;
// `head` is among them. If it can be batched, others that can be batched are taken, those of higher
// classes first, then those of tenants with less virtual time, then in their order, as long as the
// batch has room for them and the deadlines of all in it allow, at the best recent speed. Those of
// lower classes than the head's are taken only while a layer of the batch takes no longer than one
// and a half times a layer of the head, so that no flood of a low class delays a high one.
std::vector<size_t> ChoosePass(absl::Span<const WaitingPrompt> line, size_t head,
                               int64_t max_batch_tokens, const PromptSpeed& speed,
                               const StepCost& costs, absl::Time now);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_ADMISSION_H_
