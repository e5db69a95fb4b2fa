#include "server/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/prefill/prefill_engine.h"
#include "server/metrics.h"

namespace prefilld::server {
namespace {

// A layer is held up by those that go first inside it for at most so long, or for as long as it has
// computed itself if that is more, and for one step more, because all others wait for its end.
// Layers of a million tokens take seconds, in which the others may fill half of the device.
constexpr absl::Duration kLeastAllowance = absl::Milliseconds(500);

int64_t NumTokens(const PrefillJob& job) { return static_cast<int64_t>(job.work().tokens.size()); }

// Tells whether others may still come for what the job computes, and it waits for them.
bool AwaitsReceivers(const PrefillJob& job) {
  return job.work().num_receivers > 1 && job.others().awaited;
}

}  // namespace

Scheduler::Scheduler(model::PrefillEngine& engine, const PassResources& resources, EventCount& wake,
                     const QueueLimits& limits, Scheduling scheduling)
    : engine_(engine),
      resources_(resources),
      wake_(wake),
      limits_(limits),
      standings_(engine.info(), limits.tenants, resources.metrics.tenants(), scheduling) {
  for (const Tenant& tenant : limits.tenants) buckets_.emplace_back(tenant.tokens_per_second);
  RecordMeasuredAtStart(engine.info(), resources.clock.Now(), standings_.costs(), speed_);
}

Scheduler::~Scheduler() = default;

void Scheduler::SetTenants(absl::Span<const Tenant> tenants) {
  absl::MutexLock lock(&mu_);
  limits_.tenants.assign(tenants.begin(), tenants.end());
  weights_changed_ = true;
  for (size_t t = 0; t < tenants.size(); ++t) {
    if (t == buckets_.size()) buckets_.emplace_back(tenants[t].tokens_per_second);
    buckets_[t].SetRate(tenants[t].tokens_per_second, resources_.clock.Now());
  }
}

Scheduler::Admission Scheduler::Submit(std::shared_ptr<PrefillJob> job) {
  const auto refused = [](absl::Status status) {
    return Admission{std::move(status), std::nullopt};
  };
  const int64_t num_tokens = NumTokens(*job);
  job->set_expected_cached_tokens(engine_.CachedTokens(InputOf(job->work())));
  absl::MutexLock lock(&mu_);
  if (!closed_.empty()) return refused(absl::UnavailableError(closed_));
  const auto namesake = by_id_.find(job->work().id);
  if (namesake != by_id_.end() && !namesake->second->id_is_free()) {
    return refused(absl::AlreadyExistsError(
        absl::StrCat("request_id ", job->work().id, " is taken by a running request")));
  }
  const WaitingLine line = Line();
  const WaitingPrompt newcomer = Describe(*job);
  const Tenant& tenant = limits_.tenants[newcomer.tenant];
  const absl::Time now = resources_.clock.Now();
  absl::Status room = CheckTenantUse(
      tenant,
      {.requests = RequestsOf(newcomer.tenant), .queued_tokens = line.TokensOf(newcomer.tenant)},
      num_tokens, job->work().num_receivers);
  if (room.ok()) room = CheckRoom(limits_, line, newcomer);
  if (!room.ok()) {
    return {std::move(room), RetryDelay(limits_, line, newcomer.tenant, speed_.latest())};
  }
  absl::Status deadline = CheckDeadline(line, newcomer, speed_, now);
  if (!deadline.ok()) return refused(std::move(deadline));
  TokenBucket& bucket = buckets_[newcomer.tenant];
  if (absl::Status rate = CheckTenantRate(tenant, bucket, num_tokens, now); !rate.ok()) {
    return {std::move(rate), bucket.WaitFor(num_tokens, now)};
  }
  bucket.Take(num_tokens, now);

  // An idle server has made no progress for a while, which must not count as a wedge.
  if (queue_.empty() && running_.empty()) resources_.progress.Record();
  // Accepted is sent before the compute thread can see the job, so that it is the first event.
  job->delivery().Send(
      AcceptedEvent(job->work(), static_cast<int64_t>(queue_.size()) + NumRunning()));
  by_id_[job->work().id] = job;
  live_[job.get()] = job;
  queued_tokens_ += num_tokens;
  queue_.push_back(std::move(job));
  wake_.Notify();
  return {};
}

WaitingPrompt Scheduler::Describe(const PrefillJob& job) const {
  const model::AttentionOptions& attention = job.work().attention;
  return {.num_tokens = NumTokens(job),
          .cached_tokens = job.expected_cached_tokens(),
          .batch_tokens = BatchTokens(job),
          .policy = attention.policy,
          .time_left = job.work().deadline - resources_.clock.Now(),
          .ended = job.ended(),
          .tenant = job.work().tenant,
          .priority = job.work().priority};
}

// A request of several receivers shares no pass: one that is awaited, or is slow, would hold up the
// prompts of others.
int64_t Scheduler::BatchTokens(const PrefillJob& job) const {
  if (job.work().num_receivers > 1) return 0;
  return engine_.BatchTokens(NumTokens(job), job.work().attention);
}

WaitingLine Scheduler::Line() const {
  WaitingLine line;
  line.computing = !running_.empty();
  line.prompts.reserve(queue_.size());
  for (const auto& job : queue_) line.prompts.push_back(Describe(*job));
  return line;
}

// Counts the requests of a tenant whose callers cannot know yet that they are over, each with its
// further receivers.
int64_t Scheduler::RequestsOf(int tenant) const {
  int64_t requests = 0;
  for (const auto& [key, job] : live_) {
    if (job->work().tenant == tenant && !job->id_is_free()) requests += job->work().num_receivers;
  }
  return requests;
}

bool Scheduler::Retire(PrefillJob& job) {
  std::shared_ptr<PrefillJob> last_reference;  // released after the lock
  absl::MutexLock lock(&mu_);
  if (const auto live = live_.find(&job); live != live_.end()) {
    last_reference = std::move(live->second);
    live_.erase(live);
  }
  const auto named = by_id_.find(job.work().name());
  if (named != by_id_.end() && named->second.get() == &job) by_id_.erase(named);
  if (const auto queued = FindQueued(job); queued != queue_.end()) {
    queued_tokens_ -= NumTokens(job);
    queue_.erase(queued);
  }
  return last_reference != nullptr;
}

std::shared_ptr<PrefillJob> Scheduler::Find(const std::string& id, uint32_t receiver) const {
  absl::MutexLock lock(&mu_);
  const auto named = by_id_.find(PrefillWork::NameOf(id, receiver));
  return named == by_id_.end() ? nullptr : named->second;
}

std::vector<LiveJob> Scheduler::LiveJobs() const {
  std::vector<LiveJob> jobs;
  absl::MutexLock lock(&mu_);
  absl::flat_hash_map<const PrefillJob*, int64_t> requests_ahead;
  for (const auto& job : queue_) {
    requests_ahead.emplace(job.get(), static_cast<int64_t>(requests_ahead.size()) + NumRunning());
  }
  for (const auto& [key, job] : live_) {
    LiveJob live{.job = job};
    if (const auto queued = requests_ahead.find(job.get()); queued != requests_ahead.end()) {
      live.requests_ahead = queued->second;
    } else {
      live.others_wait = place_is_wanted_ || MateGoesOn(*job);
    }
    jobs.push_back(std::move(live));
  }
  return jobs;
}

// Jobs that nobody wants are not counted: they wait for nothing.
int64_t Scheduler::NumRunning() const {
  return std::count_if(running_.begin(), running_.end(),
                       [](const RunningJob& running) { return running.job->wanted(); });
}

// Tells whether another job of the same pass is still wanted.
bool Scheduler::MateGoesOn(const PrefillJob& job) const {
  const auto own = std::find_if(running_.begin(), running_.end(), [&job](const RunningJob& entry) {
    return entry.job.get() == &job;
  });
  return own != running_.end() &&
         std::any_of(running_.begin(), running_.end(), [&](const RunningJob& entry) {
           return entry.job != own->job && entry.pass == own->pass && entry.job->wanted();
         });
}

QueueState Scheduler::state() const {
  absl::MutexLock lock(&mu_);
  std::vector<int64_t> queued_of_tenants(limits_.tenants.size());
  for (const auto& job : queue_) ++queued_of_tenants[job->work().tenant];
  return {.queued_requests = static_cast<int64_t>(queue_.size()),
          .queued_tokens = queued_tokens_,
          .running_requests = NumRunning(),
          .ended_in_passes = static_cast<int64_t>(running_.size()) - NumRunning(),
          .computing = computing_,
          .live_requests = static_cast<int64_t>(live_.size()),
          .work_waits = !queue_.empty() || !running_.empty(),
          .queued_of_tenants = std::move(queued_of_tenants)};
}

model::PrefixCacheUse Scheduler::prefix_cache() const { return engine_.prefix_cache(); }

// Takes a turn at a point inside a layer of the pass `interrupted`, among those that may interject
// and those that only send. Returns false when it is that pass's turn again. Null: between layers,
// where all may.
bool Scheduler::TakeTurn(const Running* interrupted) {
  NoteClaimants();
  std::vector<Contender> contenders;
  std::vector<std::list<Running>::iterator> passes;  // of the contenders
  for (auto at = passes_.begin(); at != passes_.end(); ++at) {
    const PrefillPass& pass = *at->pass;
    const bool may_step = interrupted == nullptr || pass.may_interject() || !pass.uses_device();
    if ((at->is_stepping || !may_step) && &*at != interrupted) continue;
    passes.push_back(at);
    contenders.push_back(standings_.OfPass(pass, at->last_step_at, resources_.clock.Now()));
    // The layer that is interrupted is a step already. If it counted only at its end, a pass that
    // came first because it had waited would stay first at each of its points.
    if (&*at == interrupted) contenders.back().waited = absl::ZeroDuration();
  }
  Contender waiting;
  const std::shared_ptr<PrefillJob> head =
      BestWaiting(/*must_interject=*/interrupted != nullptr, &waiting);
  if (head != nullptr) contenders.push_back(waiting);

  for (const size_t i : standings_.Order(contenders)) {
    if (i == passes.size()) {
      StartPass(TakeJobs(*head));
      return true;
    }
    if (&*passes[i] == interrupted) return false;
    const PrefillPass::Next next =
        StepPass(*passes[i], interrupted == nullptr || passes[i]->pass->may_interject());
    if (next == PrefillPass::Next::kConsumers) continue;
    if (next == PrefillPass::Next::kOver) EndPass(passes[i]);
    return true;
  }
  return false;
}

bool Scheduler::PassAwaitsReceivers() const {
  return std::any_of(passes_.begin(), passes_.end(), [](const Running& running) {
    return AwaitsReceivers(*running.pass->jobs().front());
  });
}

// Tells the shares who has something to compute. A pass whose consumers are slow has not, and so
// its tenant saves up no time meanwhile.
void Scheduler::NoteClaimants() {
  std::vector<const PrefillJob*> claimants;
  const auto note = [&claimants](const std::shared_ptr<PrefillJob>& job) {
    if (job->wanted()) claimants.push_back(job.get());
  };
  for (const Running& running : passes_) {
    if (running.pass->waits_for_room() || !running.pass->uses_device()) continue;
    for (const auto& job : running.pass->jobs()) note(job);
  }
  const bool others_awaited = PassAwaitsReceivers();
  absl::MutexLock lock(&mu_);
  TakeOverWeights();
  for (const auto& job : queue_) {
    if (!others_awaited || !AwaitsReceivers(*job)) note(job);
  }
  standings_.shares().SetClaimants(claimants, resources_.clock.Now());
}

// Returns the prompt of the queue that should be started before the others. There is none while the
// engine has no place for any of them. It sorts nothing, since it is called at every point.
std::shared_ptr<PrefillJob> Scheduler::BestWaiting(bool must_interject, Contender* best) {
  std::shared_ptr<PrefillJob> found;
  std::optional<Contender> first;  // of those that may or may not find a place
  bool place_is_wanted = false;
  const bool others_awaited = PassAwaitsReceivers();
  const absl::Time now = resources_.clock.Now();
  absl::MutexLock lock(&mu_);
  TakeOverWeights();
  for (const auto& entry : queue_) {
    const PrefillJob& job = *entry;
    if (job.ended()) continue;
    if (others_awaited && AwaitsReceivers(job)) {
      receivers_are_awaited_ = true;
      continue;
    }
    if (must_interject && !engine_.MayInterject(NumTokens(job), job.work().attention)) continue;
    const Contender contender = standings_.OfWaiting(entry, now);
    if (found != nullptr && !standings_.GoesBefore(contender, *best)) continue;
    const bool in_a_batch = BatchTokens(job) > 0;
    const bool has_place =
        engine_.CanStart(in_a_batch ? engine_.max_batch_tokens() : NumTokens(job));
    if (!first.has_value() || standings_.GoesBefore(contender, *first)) {
      first = contender;
      place_is_wanted = !has_place;
    }
    if (!has_place) continue;
    *best = contender;
    found = entry;
  }
  place_is_wanted_ = place_is_wanted || (must_interject && place_is_wanted_);
  return found;
}

// Takes `head` and what shares its pass out of the queue. Returns none if it was retired meanwhile.
Scheduler::Jobs Scheduler::TakeJobs(const PrefillJob& head) {
  Jobs jobs;
  absl::MutexLock lock(&mu_);
  TakeOverWeights();
  const auto found = FindQueued(head);
  if (found == queue_.end()) return jobs;
  ++passes_started_;
  WaitingLine line = Line();
  for (size_t i = 0; i < queue_.size(); ++i) {
    line.prompts[i].tenant_time = standings_.shares().virtual_time(*queue_[i]);
  }
  for (const size_t i :
       ChoosePass(line.prompts, static_cast<size_t>(found - queue_.begin()),
                  engine_.max_batch_tokens(), speed_, standings_.costs(), resources_.clock.Now())) {
    queued_tokens_ -= NumTokens(*queue_[i]);
    running_.push_back({queue_[i], passes_started_});
    jobs.push_back(std::move(queue_[i]));
  }
  queue_.erase(std::remove(queue_.begin(), queue_.end(), nullptr), queue_.end());
  resources_.progress.Record();
  return jobs;
}

void Scheduler::StartPass(Jobs jobs) {
  if (jobs.empty()) return;
  std::vector<model::PromptInput> prompts;
  for (const auto& job : jobs) prompts.push_back(InputOf(job->work()));
  auto sequence = engine_.Start(prompts);
  if (sequence.ok()) {
    auto pass = std::make_unique<PrefillPass>(resources_, std::move(jobs), *std::move(sequence),
                                              engine_.info().config.num_layers);
    passes_.push_back({std::move(pass), resources_.clock.Now()});
  } else if (absl::IsInvalidArgument(sequence.status()) && jobs.size() > 1) {
    // One of them is the reason, who must not end the others.
    for (auto& job : jobs) StartPass({std::move(job)});
  } else if (absl::IsResourceExhausted(sequence.status()) && !passes_.empty()) {
    PutBack(std::move(jobs));
  } else {
    Forget(jobs);
    if (absl::IsInvalidArgument(sequence.status())) {
      jobs.front()->Abort(Outcome::kInvalid, sequence.status());
    } else {
      Fail(sequence.status());
    }
  }
}

// The jobs wait again, before all others, for a place that a pass gives back.
void Scheduler::PutBack(Jobs jobs) {
  Forget(jobs);
  absl::MutexLock lock(&mu_);
  // One that was retired meanwhile waits for nothing.
  jobs.erase(std::remove_if(jobs.begin(), jobs.end(),
                            [this](const auto& job) ABSL_SHARED_LOCKS_REQUIRED(mu_) {
                              return !live_.contains(job.get());
                            }),
             jobs.end());
  for (const auto& job : jobs) queued_tokens_ += NumTokens(*job);
  queue_.insert(queue_.begin(), jobs.begin(), jobs.end());
}

PrefillPass::Next Scheduler::StepPass(Running& running, bool may_compute) {
  PrefillPass& pass = *running.pass;
  const absl::Duration computing_before = pass.computing();
  // The device's clock counts, because the host may wait in one pass for what it has queued for
  // another.
  absl::Duration charged = computing_before;
  const auto charge = [&] {
    standings_.shares().Charge(pass.jobs(), pass.computing() - charged);
    charged = pass.computing();
  };
  const bool uses_device = pass.uses_device();
  SetComputing(uses_device);
  absl::Duration interjected;
  const auto at_point = [&] {
    const absl::Time left = resources_.clock.Now();
    const auto so_far = [&] { return interjected + (resources_.clock.Now() - left); };
    charge();
    standings_.shares().EndStep(pass.jobs(), resources_.clock.Now(),
                                pass.computing() - computing_before);
    const absl::Duration allowance = std::max(kLeastAllowance, pass.computing() - computing_before);
    while (so_far() < allowance && TakeTurn(&running)) {
    }
    interjected = so_far();
    SetComputing(true);
  };
  running.is_stepping = true;
  const auto report = pass.Step(at_point, may_compute);
  running.is_stepping = false;
  SetComputing(false);
  charge();
  running.last_step_at = resources_.clock.Now();
  if (!report.ok()) {
    Fail(report.status());
    return PrefillPass::Next::kOver;
  }
  if (uses_device && report->next != PrefillPass::Next::kConsumers) {
    standings_.shares().EndStep(pass.jobs(), running.last_step_at,
                                pass.computing() - computing_before);
  }
  if (report->layer.has_value()) standings_.RecordLayer(pass, *report->layer);
  if (report->first_tokens_after.has_value()) RecordSpeed(pass, *report->first_tokens_after);
  return report->next;
}

void Scheduler::RecordSpeed(const PrefillPass& pass, absl::Duration compute) {
  if (pass.num_computed_tokens() < pass.num_tokens()) return;
  const absl::Time now = resources_.clock.Now();
  absl::MutexLock lock(&mu_);
  if (pass.jobs().size() > 1) {
    speed_.RecordBatch(now, pass.num_tokens(), compute);
  } else {
    const auto policy = pass.jobs().front()->work().attention.policy;
    speed_.Record(now, pass.num_tokens(), policy, compute);
  }
}

void Scheduler::EndPass(std::list<Running>::iterator running) {
  const Jobs jobs(running->pass->jobs().begin(), running->pass->jobs().end());
  passes_.erase(running);
  Forget(jobs);
}

// Takes jobs off the list of those that compute.
void Scheduler::Forget(const Jobs& jobs) {
  absl::MutexLock lock(&mu_);
  for (const auto& job : jobs) {
    running_.erase(std::find_if(running_.begin(), running_.end(),
                                [&job](const RunningJob& entry) { return entry.job == job; }));
  }
}

void Scheduler::Fail(const absl::Status& cause) {
  const std::string reason = absl::StrCat("the device failed: ", cause.ToString());
  {
    absl::MutexLock lock(&mu_);
    if (!failure_.ok()) return;  // every request has been ended
    failure_ = cause;
    closed_ = reason;
  }
  resources_.metrics.CountDeviceError();
  AbortAll(Outcome::kDeviceFailed, absl::UnavailableError(reason));
}

}  // namespace prefilld::server
