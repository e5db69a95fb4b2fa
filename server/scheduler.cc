#include "server/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/prefill_engine.h"
#include "model/sampling.h"
#include "server/kv_stream.h"
#include "server/metrics.h"
#include "server/status_details.h"

namespace prefilld::server {
namespace {

// Bounds of the advice given to refused callers.
constexpr absl::Duration kMinRetryDelay = absl::Seconds(1);
constexpr absl::Duration kMaxRetryDelay = absl::Seconds(60);

// A deadline is out of reach when it leaves less than this share of the time that the work takes
// at the best speed of late.
constexpr double kHopeless = 0.5;

absl::Duration AtBest(const PromptSpeed& speed, absl::Time now, const PrefillJob& job) {
  return speed.AtBest(now, static_cast<int64_t>(job.work().tokens.size()),
                      job.work().attention.policy);
}

}  // namespace

Scheduler::Scheduler(model::PrefillEngine& engine, KvStream& stream, Metrics& metrics,
                     const Clock& clock, const QueueLimits& limits, const JobTimeouts& timeouts)
    : engine_(engine),
      stream_(stream),
      metrics_(metrics),
      clock_(clock),
      limits_(limits),
      timeouts_(timeouts),
      progress_at_us_(absl::ToUnixMicros(clock.Now())),
      thread_([this] { Run(); }) {}

Scheduler::~Scheduler() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
}

absl::Status Scheduler::Submit(std::shared_ptr<PrefillJob> job) {
  const auto num_tokens = static_cast<int64_t>(job->work().tokens.size());
  absl::MutexLock lock(&mu_);
  if (!closed_.empty()) return absl::UnavailableError(closed_);
  if (live_.contains(job->work().id)) {
    return absl::AlreadyExistsError(
        absl::StrCat("request_id ", job->work().id, " is taken by a running request"));
  }
  if (absl::Status room = CheckRoom(num_tokens); !room.ok()) return room;
  if (absl::Status deadline = CheckDeadline(*job); !deadline.ok()) return deadline;

  // An idle server has made no progress for a while; that is no wedge.
  if (queue_.empty() && running_ == nullptr) RecordProgress();
  // Before the compute thread can see the job, so that Accepted is the first event.
  job->Accept(static_cast<int64_t>(queue_.size()) + (running_ != nullptr ? 1 : 0));
  live_[job->work().id] = job;
  queued_tokens_ += num_tokens;
  queue_.push_back(std::move(job));
  return absl::OkStatus();
}

absl::Status Scheduler::CheckRoom(int64_t num_tokens) const {
  // With nothing running, the first in the queue is about to.
  const int64_t waiting = static_cast<int64_t>(queue_.size()) - (running_ == nullptr ? 1 : 0);
  std::string reason;
  if (waiting >= limits_.capacity) {
    reason = absl::StrCat("the queue is full: ", queue_.size(), " requests wait; at most ",
                          limits_.capacity);
  } else if (!queue_.empty() && queued_tokens_ + num_tokens > limits_.max_queued_tokens) {
    reason = absl::StrCat("the queue is full: ", queued_tokens_, " tokens wait and ", num_tokens,
                          " came; at most ", limits_.max_queued_tokens);
  } else {
    return absl::OkStatus();
  }
  const double speed = speed_.latest() > 0 ? speed_.latest() : 1000.0;
  const absl::Duration delay = absl::Seconds(static_cast<double>(queued_tokens_) / speed);
  return WithRetryDelay(absl::ResourceExhaustedError(reason),
                        std::clamp(delay, kMinRetryDelay, kMaxRetryDelay));
}

// What is left of the running prompt is not counted: it may end at any moment.
absl::Status Scheduler::CheckDeadline(const PrefillJob& job) const {
  const absl::Duration time_left = job.time_left();
  if (time_left == absl::InfiniteDuration()) return absl::OkStatus();
  const absl::Time now = clock_.Now();
  absl::Duration queue;
  for (const auto& queued : queue_) queue += AtBest(speed_, now, *queued);
  const absl::Duration compute = AtBest(speed_, now, job);
  if (time_left >= kHopeless * (queue + compute)) return absl::OkStatus();
  const auto rounded = [](absl::Duration d) {
    return absl::FormatDuration(absl::Trunc(d, absl::Milliseconds(1)));
  };
  return absl::DeadlineExceededError(absl::StrCat(
      "the deadline is in ", rounded(time_left), "; at the best speed of late the queue takes ",
      rounded(queue), " and this prompt ", rounded(compute)));
}

void Scheduler::Retire(PrefillJob& job) {
  std::shared_ptr<PrefillJob> last_reference;  // released after the lock
  absl::MutexLock lock(&mu_);
  const auto live = live_.find(job.work().id);
  if (live != live_.end() && live->second.get() == &job) {
    last_reference = std::move(live->second);
    live_.erase(live);
  }
  const auto queued = std::find_if(queue_.begin(), queue_.end(),
                                   [&job](const auto& entry) { return entry.get() == &job; });
  if (queued != queue_.end()) {
    queued_tokens_ -= static_cast<int64_t>(job.work().tokens.size());
    queue_.erase(queued);
  }
}

std::shared_ptr<PrefillJob> Scheduler::Find(const std::string& id) const {
  absl::MutexLock lock(&mu_);
  const auto live = live_.find(id);
  return live == live_.end() ? nullptr : live->second;
}

std::vector<LiveJob> Scheduler::LiveJobs() const {
  std::vector<LiveJob> jobs;
  absl::MutexLock lock(&mu_);
  absl::flat_hash_map<const PrefillJob*, int64_t> requests_ahead;
  for (const auto& job : queue_) {
    const int64_t ahead = static_cast<int64_t>(requests_ahead.size()) + (running_ ? 1 : 0);
    requests_ahead.emplace(job.get(), ahead);
  }
  for (const auto& [id, job] : live_) {
    LiveJob live{.job = job};
    if (const auto queued = requests_ahead.find(job.get()); queued != requests_ahead.end()) {
      live.requests_ahead = queued->second;
    } else {
      live.others_wait = !queue_.empty() || (running_ != nullptr && running_ != job);
    }
    jobs.push_back(std::move(live));
  }
  return jobs;
}

QueueState Scheduler::state() const {
  absl::MutexLock lock(&mu_);
  return {.queued_requests = static_cast<int64_t>(queue_.size()),
          .queued_tokens = queued_tokens_,
          .running_requests = running_ != nullptr ? 1 : 0,
          .live_requests = static_cast<int64_t>(live_.size())};
}

void Scheduler::Close(const std::string& reason) {
  absl::MutexLock lock(&mu_);
  if (closed_.empty()) closed_ = reason;
}

void Scheduler::AbortAll(Outcome outcome, const absl::Status& status) {
  for (const LiveJob& live : LiveJobs()) live.job->Abort(outcome, status);
}

bool Scheduler::AwaitIdle(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return live_.empty() && running_ == nullptr;
  };
  return mu_.AwaitWithTimeout(absl::Condition(&idle), timeout);
}

absl::Status Scheduler::failure() const {
  absl::MutexLock lock(&mu_);
  return failure_;
}

void Scheduler::RecordProgress() {
  progress_at_us_.store(absl::ToUnixMicros(clock_.Now()), std::memory_order_relaxed);
}

absl::Duration Scheduler::WithoutProgressFor(absl::Time now) const {
  {
    absl::MutexLock lock(&mu_);
    if (queue_.empty() && running_ == nullptr) return absl::ZeroDuration();
  }
  return now - absl::FromUnixMicros(progress_at_us_.load(std::memory_order_relaxed));
}

void Scheduler::Run() {
  while (const std::shared_ptr<PrefillJob> job = NextJob()) {
    if (!job->ended()) Compute(*job);
    absl::MutexLock lock(&mu_);
    running_ = nullptr;
  }
}

std::shared_ptr<PrefillJob> Scheduler::NextJob() {
  absl::MutexLock lock(&mu_);
  const auto wake = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stop_ || !queue_.empty(); };
  mu_.Await(absl::Condition(&wake));
  if (stop_) return nullptr;
  running_ = std::move(queue_.front());
  queue_.pop_front();
  queued_tokens_ -= static_cast<int64_t>(running_->work().tokens.size());
  RecordProgress();
  return running_;
}

void Scheduler::Compute(PrefillJob& job) {
  auto sequence = engine_.Start(job.work().tokens, job.work().attention);
  if (absl::IsInvalidArgument(sequence.status())) {
    job.Abort(Outcome::kInvalid, sequence.status());
    return;
  }
  if (!sequence.ok()) {
    Fail(sequence.status());
    return;
  }
  if (job.ended()) return;  // meanwhile; nothing is to be delivered any more
  job.Start((*sequence)->policy());
  stream_.Begin(job, **sequence);
  absl::Status status = ComputeLayers(job, **sequence);
  // The packing threads borrow the sequence until here.
  status.Update(stream_.End());
  sequence->reset();
  if (!status.ok()) {
    Fail(status);
  } else if (!job.ended()) {
    job.Finish();
  }
}

// OK also when the job ended on the way.
absl::Status Scheduler::ComputeLayers(PrefillJob& job, model::PrefillSequence& sequence) {
  const auto num_tokens = static_cast<int64_t>(job.work().tokens.size());
  const absl::Time started = clock_.Now();
  absl::Duration waited;
  for (int layer = 0; layer < engine_.info().config.num_layers; ++layer) {
    const absl::Time ready = clock_.Now();
    if (absl::Status slot = stream_.WaitForSlot(); !slot.ok()) return slot;
    const absl::Duration stalled = clock_.Now() - ready;
    job.RecordStall(stalled);
    metrics_.CountStall(stalled);
    waited += stalled;

    job.CheckTimers(timeouts_, /*queue_position=*/0, /*others_wait=*/false);
    if (job.ended()) return absl::OkStatus();
    const auto report = sequence.RunLayer();
    if (!report.ok()) return report.status();
    RecordProgress();
    metrics_.CountLayer(*report, num_tokens);
    job.RecordLayer(*report);
    stream_.LayerDone(layer);
  }
  if (absl::Status token = ComputeFirstToken(job, sequence); !token.ok()) return token;
  const absl::Time now = clock_.Now();
  {
    absl::MutexLock lock(&mu_);
    speed_.Record(now, num_tokens, job.work().attention.policy, now - started - waited);
  }
  return job.work().prompt_logprobs ? ComputeLogprobs(job, sequence) : absl::OkStatus();
}

absl::Status Scheduler::ComputeFirstToken(PrefillJob& job, model::PrefillSequence& sequence) {
  const auto logits = sequence.FinalLogits();
  if (!logits.ok()) return logits.status();
  const auto num_tokens = static_cast<int64_t>(job.work().tokens.size());
  auto token = model::Sample(logits->front(), job.work().sampling, num_tokens);
  if (token.ok()) {
    job.RecordFirstToken(*std::move(token));
  } else {
    job.Abort(Outcome::kInternal, token.status());
  }
  RecordProgress();
  return absl::OkStatus();
}

// OK also when the job ended on the way, as between layers.
absl::Status Scheduler::ComputeLogprobs(PrefillJob& job, model::PrefillSequence& sequence) {
  const auto go_on = [&] {
    RecordProgress();
    job.CheckTimers(timeouts_, /*queue_position=*/0, /*others_wait=*/false);
    return !job.ended();
  };
  const absl::Time started = clock_.Now();
  auto logprobs = sequence.Logprobs(/*prompt=*/0, go_on);
  if (absl::IsCancelled(logprobs.status())) return absl::OkStatus();
  if (!logprobs.ok()) return logprobs.status();
  job.RecordLogprobs(*std::move(logprobs), clock_.Now() - started);
  RecordProgress();
  return absl::OkStatus();
}

void Scheduler::Fail(const absl::Status& cause) {
  const std::string reason = absl::StrCat("the device failed: ", cause.ToString());
  {
    absl::MutexLock lock(&mu_);
    failure_ = cause;
    closed_ = reason;
  }
  metrics_.CountDeviceError();
  AbortAll(Outcome::kDeviceFailed, absl::UnavailableError(reason));
}

}  // namespace prefilld::server
