#include "server/admission.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/refusal_cause.h"

namespace prefilld::server {
namespace {

constexpr absl::Duration kMinRetryDelay = absl::Seconds(1);
constexpr absl::Duration kMaxRetryDelay = absl::Seconds(60);
// This speed serves for the retry delay until a prompt has been measured.
constexpr double kUnmeasuredTokensPerSecond = 1000.0;

// A deadline is out of reach when it leaves less than this share of the time that is needed.
constexpr double kHopeless = 0.5;

// Prompts of lower classes may make a pass longer than its head alone by this factor.
constexpr double kMostByLowerClasses = 1.5;

// One resource of the queue: its places, or the tokens that may wait.
struct Resource {
  std::vector<int64_t> used;  // [tenants]
  int64_t limit = 0;
  int64_t least_share = 0;  // of a tenant
};

// Tells whether the tenant may have `wanted` more of it: within its own share, or from what is
// there for all.
bool HasRoom(const Resource& resource, absl::Span<const Tenant> tenants, size_t tenant,
             int64_t wanted) {
  double weights = 0;
  for (const Tenant& each : tenants) weights += each.is_gone ? 0 : each.weight;
  int64_t for_all = resource.limit;
  int64_t used_of_that = 0;
  for (size_t t = 0; t < tenants.size(); ++t) {
    int64_t share = 0;
    if (tenants.size() > 1 && !tenants[t].is_gone) {
      const double part = 0.5 * tenants[t].weight / weights;
      share = std::max(resource.least_share,
                       static_cast<int64_t>(part * static_cast<double>(resource.limit)));
    }
    const int64_t used = resource.used[t] + (t == tenant ? wanted : 0);
    if (t == tenant && used <= share) return true;
    for_all -= share;
    used_of_that += std::max<int64_t>(0, used - share);
  }
  return used_of_that <= std::max<int64_t>(0, for_all);
}

// Says whose limit a newcomer has met for whom there is no room: the queue's, or that of a tenant
// who may not have what is left, because it is kept for others.
RefusalCause CauseOfNoRoom(const Resource& resource, int64_t wanted) {
  const int64_t used = std::accumulate(resource.used.begin(), resource.used.end(), int64_t{0});
  return used + wanted <= resource.limit ? RefusalCause::kTenantShare : RefusalCause::kQueueFull;
}

// Tells whether a prompt goes before the newcomer as far as classes and tenants decide it.
bool MayPrecede(const WaitingPrompt& prompt, const WaitingPrompt& newcomer) {
  return prompt.priority > newcomer.priority ||
         (prompt.priority == newcomer.priority && prompt.tenant == newcomer.tenant);
}

}  // namespace

int64_t WaitingLine::TokensOf(int tenant) const {
  int64_t sum = 0;
  for (const WaitingPrompt& prompt : prompts) {
    if (prompt.tenant == tenant) sum += prompt.num_tokens;
  }
  return sum;
}

absl::Status CheckRoom(const QueueLimits& limits, const WaitingLine& line,
                       const WaitingPrompt& newcomer) {
  const auto own = static_cast<size_t>(newcomer.tenant);
  const auto queued = static_cast<int64_t>(line.prompts.size());
  // When nothing computes, the prompt at the head of the line is about to.
  Resource places = {.used = std::vector<int64_t>(limits.tenants.size()),
                     .limit = limits.capacity + (line.computing ? 0 : 1),
                     .least_share = limits.capacity > 0 ? 1 : 0};
  Resource tokens = {.used = std::vector<int64_t>(limits.tenants.size()),
                     .limit = limits.max_queued_tokens};
  for (const WaitingPrompt& prompt : line.prompts) {
    ++places.used[static_cast<size_t>(prompt.tenant)];
    tokens.used[static_cast<size_t>(prompt.tenant)] += prompt.num_tokens;
  }
  std::string whose;
  if (limits.tenants.size() > 1) {
    whose = absl::StrCat(" for tenant ", limits.tenants[own].name, ", who has ", places.used[own],
                         " requests and ", tokens.used[own], " tokens in it");
  }
  if (!HasRoom(places, limits.tenants, own, 1)) {
    return Because(CauseOfNoRoom(places, 1), absl::ResourceExhaustedError(absl::StrCat(
                                                 "the queue is full", whose, ": ", queued,
                                                 " requests wait; at most ", limits.capacity)));
  }
  if (places.used[own] > 0 && !HasRoom(tokens, limits.tenants, own, newcomer.num_tokens)) {
    int64_t queued_tokens = 0;
    for (const int64_t used : tokens.used) queued_tokens += used;
    return Because(CauseOfNoRoom(tokens, newcomer.num_tokens),
                   absl::ResourceExhaustedError(absl::StrCat(
                       "the queue is full", whose, ": ", queued_tokens, " tokens wait and ",
                       newcomer.num_tokens, " came; at most ", limits.max_queued_tokens)));
  }
  return absl::OkStatus();
}

absl::Duration RetryDelay(const QueueLimits& limits, const WaitingLine& line, int tenant,
                          double tokens_per_second) {
  const double own = limits.tenants[static_cast<size_t>(tenant)].weight;
  std::vector<bool> waits(limits.tenants.size());
  waits[static_cast<size_t>(tenant)] = true;
  for (const WaitingPrompt& prompt : line.prompts) waits[static_cast<size_t>(prompt.tenant)] = true;
  double all = 0;
  for (size_t t = 0; t < waits.size(); ++t) all += waits[t] ? limits.tenants[t].weight : 0;
  const double speed = tokens_per_second > 0 ? tokens_per_second : kUnmeasuredTokensPerSecond;
  const absl::Duration delay =
      absl::Seconds(static_cast<double>(line.TokensOf(tenant)) / (speed * own / all));
  return std::clamp(delay, kMinRetryDelay, kMaxRetryDelay);
}

absl::Status CheckDeadline(const WaitingLine& line, const WaitingPrompt& newcomer,
                           const PromptSpeed& speed, absl::Time now) {
  if (newcomer.time_left == absl::InfiniteDuration()) return absl::OkStatus();
  const absl::Duration queue = QueueAtBest(line, newcomer, speed, now);
  const absl::Duration compute = speed.AtBest(now, newcomer.num_new_tokens(), newcomer.policy);
  if (newcomer.time_left >= kHopeless * (queue + compute)) return absl::OkStatus();
  const auto rounded = [](absl::Duration d) {
    return absl::FormatDuration(absl::Trunc(d, absl::Milliseconds(1)));
  };
  return absl::DeadlineExceededError(absl::StrCat(
      "the deadline is in ", rounded(newcomer.time_left), "; at the best speed of late the queue ",
      "takes ", rounded(queue), " and this prompt ", rounded(compute)));
}

absl::Duration QueueAtBest(const WaitingLine& line, const WaitingPrompt& newcomer,
                           const PromptSpeed& speed, absl::Time now) {
  const bool may_be_batched = newcomer.batch_tokens > 0;
  const absl::Duration own = speed.AtBest(now, newcomer.num_new_tokens(), newcomer.policy);
  absl::Duration alone;
  int64_t batched_tokens = 0;
  for (const WaitingPrompt& prompt : line.prompts) {
    if (!MayPrecede(prompt, newcomer)) continue;
    if (prompt.batch_tokens == 0) {
      const absl::Duration compute = speed.AtBest(now, prompt.num_new_tokens(), prompt.policy);
      if (compute <= own) alone += compute;
    } else if (may_be_batched) {
      break;
    } else {
      batched_tokens += prompt.num_tokens;
    }
  }
  return alone + speed.BatchedAtBest(now, batched_tokens);
}

std::vector<size_t> ChoosePass(absl::Span<const WaitingPrompt> line, size_t head,
                               int64_t max_batch_tokens, const PromptSpeed& speed,
                               const StepCost& costs, absl::Time now) {
  std::vector<size_t> chosen = {head};
  if (line[head].batch_tokens == 0) return chosen;
  std::vector<size_t> order(line.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    if (line[a].priority != line[b].priority) return line[a].priority > line[b].priority;
    return line[a].tenant_time < line[b].tenant_time;
  });
  int64_t room = max_batch_tokens - line[head].batch_tokens;
  int64_t num_tokens = line[head].num_tokens;
  absl::Duration time_left = line[head].time_left;  // the least of all that are chosen
  const auto layer_of = [&](int64_t tokens) { return costs.Layer(line[head].policy, tokens); };
  const absl::Duration longest_layer = kMostByLowerClasses * layer_of(num_tokens);
  for (const size_t i : order) {
    if (room <= 0) break;
    const WaitingPrompt& next = line[i];
    if (i == head || next.ended || next.batch_tokens == 0 || next.batch_tokens > room) continue;
    const int64_t tokens_with_it = num_tokens + next.num_tokens;
    const absl::Duration time_left_with_it = std::min(time_left, next.time_left);
    if (speed.BatchedAtBest(now, tokens_with_it) > time_left_with_it) continue;
    const bool is_lower = next.priority < line[head].priority;
    if (is_lower && layer_of(tokens_with_it) > longest_layer) continue;
    chosen.push_back(i);
    room -= next.batch_tokens;
    num_tokens = tokens_with_it;
    time_left = time_left_with_it;
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace prefilld::server
