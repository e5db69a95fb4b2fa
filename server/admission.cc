#include "server/admission.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace prefilld::server {
namespace {

constexpr absl::Duration kMinRetryDelay = absl::Seconds(1);
constexpr absl::Duration kMaxRetryDelay = absl::Seconds(60);
// This speed serves for the retry delay until a prompt has been measured.
constexpr double kUnmeasuredTokensPerSecond = 1000.0;

// A deadline is out of reach when it leaves less than this share of the time that is needed.
constexpr double kHopeless = 0.5;

}  // namespace

int64_t WaitingLine::num_tokens() const {
  int64_t sum = 0;
  for (const WaitingPrompt& prompt : prompts) sum += prompt.num_tokens;
  return sum;
}

absl::Status CheckRoom(const QueueLimits& limits, const WaitingLine& line, int64_t num_tokens) {
  const auto queued = static_cast<int64_t>(line.prompts.size());
  // When nothing computes, the prompt at the head of the line is about to.
  const int64_t waiting = queued - (line.computing ? 0 : 1);
  if (waiting >= limits.capacity) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", queued, " requests wait; at most ", limits.capacity));
  }
  const int64_t queued_tokens = line.num_tokens();
  if (queued > 0 && queued_tokens + num_tokens > limits.max_queued_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", queued_tokens,
                                                     " tokens wait and ", num_tokens,
                                                     " came; at most ", limits.max_queued_tokens));
  }
  return absl::OkStatus();
}

absl::Duration RetryDelay(const WaitingLine& line, double tokens_per_second) {
  const double speed = tokens_per_second > 0 ? tokens_per_second : kUnmeasuredTokensPerSecond;
  const absl::Duration delay = absl::Seconds(static_cast<double>(line.num_tokens()) / speed);
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
                               int64_t max_batch_tokens, const PromptSpeed& speed, absl::Time now) {
  std::vector<size_t> chosen = {head};
  if (line[head].batch_tokens == 0) return chosen;
  int64_t room = max_batch_tokens - line[head].batch_tokens;
  int64_t num_tokens = line[head].num_tokens;
  absl::Duration time_left = line[head].time_left;  // the least of all that are chosen
  for (size_t i = 0; i < line.size() && room > 0; ++i) {
    const WaitingPrompt& next = line[i];
    if (i == head || next.ended || next.batch_tokens == 0 || next.batch_tokens > room) continue;
    const int64_t tokens_with_it = num_tokens + next.num_tokens;
    const absl::Duration time_left_with_it = std::min(time_left, next.time_left);
    if (speed.BatchedAtBest(now, tokens_with_it) > time_left_with_it) continue;
    chosen.push_back(i);
    room -= next.batch_tokens;
    num_tokens = tokens_with_it;
    time_left = time_left_with_it;
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace prefilld::server
