#include "server/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/prefill/prefill_engine.h"
#include "server/metrics.h"

namespace prefilld::server {
namespace {

int64_t NumTokens(const PrefillJob& job) { return static_cast<int64_t>(job.work().tokens.size()); }

}  // namespace

Scheduler::Scheduler(model::PrefillEngine& engine, const PassResources& resources, EventCount& wake,
                     const QueueLimits& limits)
    : engine_(engine), resources_(resources), wake_(wake), limits_(limits) {}

Scheduler::~Scheduler() = default;

Scheduler::Admission Scheduler::Submit(std::shared_ptr<PrefillJob> job) {
  const auto refused = [](absl::Status status) {
    return Admission{std::move(status), std::nullopt};
  };
  const int64_t num_tokens = NumTokens(*job);
  absl::MutexLock lock(&mu_);
  if (!closed_.empty()) return refused(absl::UnavailableError(closed_));
  if (live_.contains(job->work().id)) {
    return refused(absl::AlreadyExistsError(
        absl::StrCat("request_id ", job->work().id, " is taken by a running request")));
  }
  const WaitingLine line = Line();
  if (absl::Status room = CheckRoom(limits_, line, num_tokens); !room.ok()) {
    return {std::move(room), RetryDelay(line, speed_.latest())};
  }
  absl::Status deadline = CheckDeadline(line, Describe(*job), speed_, resources_.clock.Now());
  if (!deadline.ok()) return refused(std::move(deadline));

  // An idle server has made no progress for a while, which must not count as a wedge.
  if (queue_.empty() && running_.empty()) resources_.progress.Record();
  // Accepted is sent before the compute thread can see the job, so that it is the first event.
  job->delivery().Send(
      AcceptedEvent(job->work(), static_cast<int64_t>(queue_.size() + running_.size())));
  live_[job->work().id] = job;
  queued_tokens_ += num_tokens;
  queue_.push_back(std::move(job));
  wake_.Notify();
  return {};
}

WaitingPrompt Scheduler::Describe(const PrefillJob& job) const {
  const model::AttentionOptions& attention = job.work().attention;
  return {.num_tokens = NumTokens(job),
          .batch_tokens = engine_.BatchTokens(NumTokens(job), attention),
          .policy = attention.policy,
          .time_left = job.work().deadline - resources_.clock.Now(),
          .ended = job.ended()};
}

WaitingLine Scheduler::Line() const {
  WaitingLine line;
  line.computing = !running_.empty();
  line.prompts.reserve(queue_.size());
  for (const auto& job : queue_) line.prompts.push_back(Describe(*job));
  return line;
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
    queued_tokens_ -= NumTokens(job);
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
    requests_ahead.emplace(job.get(),
                           static_cast<int64_t>(requests_ahead.size() + running_.size()));
  }
  for (const auto& [id, job] : live_) {
    LiveJob live{.job = job};
    if (const auto queued = requests_ahead.find(job.get()); queued != requests_ahead.end()) {
      live.requests_ahead = queued->second;
    } else {
      live.others_wait = !queue_.empty() || RunningBeside(job.get()) > 0;
    }
    jobs.push_back(std::move(live));
  }
  return jobs;
}

// Jobs that have ended are not counted: they wait for nothing.
int64_t Scheduler::RunningBeside(const PrefillJob* job) const {
  return std::count_if(running_.begin(), running_.end(), [job](const auto& running) {
    return running.get() != job && !running->ended();
  });
}

QueueState Scheduler::state() const {
  absl::MutexLock lock(&mu_);
  return {.queued_requests = static_cast<int64_t>(queue_.size()),
          .queued_tokens = queued_tokens_,
          .running_requests = RunningBeside(nullptr),
          .live_requests = static_cast<int64_t>(live_.size()),
          .work_waits = !queue_.empty() || !running_.empty()};
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
    return live_.empty() && running_.empty();
  };
  return mu_.AwaitWithTimeout(absl::Condition(&idle), timeout);
}

absl::Status Scheduler::failure() const {
  absl::MutexLock lock(&mu_);
  return failure_;
}

bool Scheduler::StepOnce() {
  if (pass_ != nullptr) {
    const PrefillPass::Next next = StepPass();
    if (next == PrefillPass::Next::kConsumers) return false;
    if (next == PrefillPass::Next::kOver) pass_.reset();
  } else {
    if (starting_.empty()) {
      Jobs jobs = TakeNextJobs();
      if (jobs.empty()) return false;
      starting_.push_back(std::move(jobs));
    }
    Jobs jobs = std::move(starting_.front());
    starting_.pop_front();
    StartPass(std::move(jobs));
  }
  if (pass_ == nullptr && starting_.empty()) {
    absl::MutexLock lock(&mu_);
    running_.clear();
  }
  return true;
}

Scheduler::Jobs Scheduler::TakeNextJobs() {
  absl::MutexLock lock(&mu_);
  if (queue_.empty()) return {};
  const std::vector<size_t> chosen =
      ChooseNextPass(Line().prompts, engine_.max_batch_tokens(), speed_, resources_.clock.Now());
  for (const size_t i : chosen) {
    queued_tokens_ -= NumTokens(*queue_[i]);
    running_.push_back(std::move(queue_[i]));
  }
  queue_.erase(std::remove(queue_.begin(), queue_.end(), nullptr), queue_.end());
  resources_.progress.Record();
  return running_;
}

void Scheduler::StartPass(Jobs jobs) {
  jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const auto& job) { return job->ended(); }),
             jobs.end());
  if (jobs.empty()) return;
  std::vector<model::PromptInput> prompts;
  for (const auto& job : jobs) {
    const PrefillWork& work = job->work();
    prompts.push_back({work.tokens, work.attention, work.prompt_logprobs});
  }
  auto sequence = engine_.Start(prompts);
  if (absl::IsInvalidArgument(sequence.status())) {
    if (jobs.size() == 1) {
      jobs.front()->Abort(Outcome::kInvalid, sequence.status());
    } else {  // one of them, who must not end the others
      for (auto& job : jobs) starting_.push_back({std::move(job)});
    }
  } else if (!sequence.ok()) {
    Fail(sequence.status());
  } else {
    pass_ = std::make_unique<PrefillPass>(resources_, std::move(jobs), *std::move(sequence),
                                          engine_.info().config.num_layers);
  }
}

PrefillPass::Next Scheduler::StepPass() {
  const auto report = pass_->Step();
  if (!report.ok()) {
    pass_.reset();
    Fail(report.status());
    return PrefillPass::Next::kOver;
  }
  if (report->first_tokens_after.has_value()) RecordSpeed(*report->first_tokens_after);
  return report->next;
}

void Scheduler::RecordSpeed(absl::Duration compute) {
  const absl::Time now = resources_.clock.Now();
  absl::MutexLock lock(&mu_);
  if (pass_->jobs().size() > 1) {
    speed_.RecordBatch(now, pass_->num_tokens(), compute);
  } else {
    const auto policy = pass_->jobs().front()->work().attention.policy;
    speed_.Record(now, pass_->num_tokens(), policy, compute);
  }
}

void Scheduler::Fail(const absl::Status& cause) {
  const std::string reason = absl::StrCat("the device failed: ", cause.ToString());
  {
    absl::MutexLock lock(&mu_);
    failure_ = cause;
    closed_ = reason;
  }
  resources_.metrics.CountDeviceError();
  AbortAll(Outcome::kDeviceFailed, absl::UnavailableError(reason));
}

ComputeThread::ComputeThread(Scheduler& scheduler, EventCount& wake)
    : scheduler_(scheduler), wake_(wake), thread_([this] { Run(); }) {}

ComputeThread::~ComputeThread() {
  stop_ = true;
  wake_.Notify();
  thread_.join();
}

void ComputeThread::Run() {
  while (!stop_) {
    const int64_t events = wake_.count();
    if (!scheduler_.StepOnce() && !stop_) wake_.AwaitAfter(events);
  }
}

}  // namespace prefilld::server
