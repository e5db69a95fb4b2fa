#include "tests/bench/simulator/simulation.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "server/clock.h"
#include "server/event_count.h"
#include "server/kv_packer.h"
#include "server/metrics.h"
#include "server/prefill_job.h"
#include "server/prefill_pass.h"
#include "server/prefill_work.h"
#include "server/scheduler.h"
#include "server/staging_ring.h"
#include "server/transport.h"
#include "tests/bench/simulator/timed_engine.h"

namespace prefilld::bench {
namespace {

using client::LoadEnd;
using client::LoadRequest;

constexpr int64_t kDefaultQueuedPrompts = 8;  // as a server's

class JumpingClock final : public server::Clock {
 public:
  absl::Time Now() const override { return now_; }
  void JumpTo(absl::Time time) { now_ = std::max(now_, time); }

 private:
  absl::Time now_ = absl::UnixEpoch() + absl::Hours(24);
};

// The caller of one request, who takes everything at once.
class Caller final : public server::Transport {
 public:
  Caller(std::shared_ptr<server::PrefillJob> job, size_t index)
      : job_(std::move(job)), index_(index) {
    job_->delivery().control().Attach(this);
  }

  size_t index() const { return index_; }
  server::PrefillJob& job() const { return *job_; }
  bool is_over() const { return end_.has_value(); }
  const absl::Status& end() const { return *end_; }

  void Send(server::Message, bool) override { job_->delivery().control().OnWriteDone(true); }
  void End(const absl::Status& status) override {
    end_ = status;
    if (status.ok()) job_->OnResultSent();
  }
  void Cancel(const absl::Status&) override {}

 private:
  const std::shared_ptr<server::PrefillJob> job_;
  const size_t index_;
  std::optional<absl::Status> end_;
};

class Simulation {
 public:
  Simulation(const ServerProfile& profile, const std::vector<LoadRequest>& requests,
             const SimulationOptions& options)
      : profile_(profile),
        requests_(requests),
        options_(options),
        began_(clock_.Now()),
        engine_(profile, options.prefix_cache_bytes,
                [this](absl::Duration time) { PassUntil(clock_.Now() + time); }),
        ring_(*server::StagingRing::Create(engine_, /*num_buffers=*/2, /*buffer_bytes=*/64)),
        metrics_(engine_.info(), options.tenants.all()),
        progress_(clock_),
        packer_({.ring = *ring_, .metrics = metrics_, .progress = progress_, .wake = wake_},
                engine_.kv_slots(), /*num_threads=*/0),
        scheduler_(engine_,
                   {.packer = packer_,
                    .metrics = metrics_,
                    .progress = progress_,
                    .clock = clock_,
                    .timeouts = {}},
                   wake_,
                   {.capacity = options.queue_capacity,
                    .max_queued_tokens = options.max_queued_tokens > 0
                                             ? options.max_queued_tokens
                                             : kDefaultQueuedPrompts * profile.max_tokens,
                    .tenants = {options.tenants.all().begin(), options.tenants.all().end()}},
                   options.scheduling) {}

  absl::StatusOr<std::vector<LoadEnd>> Run() {
    while (ends_.size() < requests_.size()) {
      const bool stepped = scheduler_.StepOnce();
      CollectEnds();
      if (stepped) continue;
      if (next_ == requests_.size()) break;
      PassUntil(began_ + requests_[next_].arrival);
    }
    if (ends_.size() < requests_.size()) {
      return absl::InternalError(absl::StrCat("the scheduler stopped after ", ends_.size(), " of ",
                                              requests_.size(), " requests"));
    }
    // The last passes give their places back.
    while (scheduler_.StepOnce()) {
    }
    return std::move(ends_);
  }

 private:
  // Lets time pass, and requests come at their moments.
  void PassUntil(absl::Time end) {
    while (next_ < requests_.size() && began_ + requests_[next_].arrival <= end) {
      clock_.JumpTo(began_ + requests_[next_].arrival);
      Submit(next_++);
    }
    clock_.JumpTo(end);
  }

  void Submit(size_t index) {
    auto work = MakeWork(index);
    if (!work.ok()) return Refuse(index, work.status());
    auto job = std::make_shared<server::PrefillJob>(*std::move(work), clock_);
    if (const auto admission = scheduler_.Submit(job); !admission.status.ok()) {
      return Refuse(index, admission.status);
    }
    callers_.push_back(std::make_unique<Caller>(std::move(job), index));
  }

  // Makes the work as the service does. No block of KV is asked for.
  absl::StatusOr<server::PrefillWork> MakeWork(size_t index) const {
    const LoadRequest& load = requests_[index];
    ::prefill::v1::PrefillRequest request;
    const auto tokens = client::TokensOf(load, index, options_.seed,
                                         static_cast<uint32_t>(engine_.info().config.vocab_size));
    request.mutable_token_ids()->Assign(tokens.begin(), tokens.end());
    request.set_priority(load.priority);
    request.mutable_layout()->set_block_tokens(128);
    request.mutable_layout()->set_first_block(static_cast<uint32_t>((load.num_tokens + 127) / 128));
    server::RequestLimits limits;
    limits.engine = &engine_.info();
    limits.attention.defaults = engine_.info().default_attention;
    limits.attention.defaults.policy = options_.policy;
    PREFILLD_ASSIGN_OR_RETURN(server::PrefillWork work, ValidateRequest(request, limits));
    const auto tenant = options_.tenants.ByName(load.tenant);
    if (!tenant.has_value()) {
      return absl::UnauthenticatedError(absl::StrCat("tenant ", load.tenant, " is unknown"));
    }
    work.tenant = static_cast<int>(*tenant);
    const server::Tenant& of = options_.tenants.all()[*tenant];
    work.priority = std::min(work.priority, of.max_priority);
    if (options_.has_tenants) work.cache_salt = absl::StrCat(of.name, "\n", work.cache_salt);
    return work;
  }

  void Refuse(size_t index, const absl::Status& status) {
    LoadEnd& end = ends_.emplace_back();
    end.request = requests_[index];
    end.code = status.code();
  }

  void CollectEnds() {
    for (const auto& caller : callers_) {
      if (!caller->is_over()) continue;
      const absl::Duration beside = absl::Microseconds(profile_.request_us);
      const auto stats = caller->job().record().stats();
      LoadEnd& end = ends_.emplace_back();
      end.request = requests_[caller->index()];
      end.code = caller->end().code();
      const absl::Time due = began_ + end.request.arrival;
      end.ended = clock_.Now() - due + beside;
      if (caller->end().ok()) {
        end.first_token = *stats.first_token_at - due + beside;
        end.result = end.ended = *end.first_token;
        end.cached_tokens = stats.cached_tokens;
      }
      scheduler_.Retire(caller->job());
    }
    callers_.erase(std::remove_if(callers_.begin(), callers_.end(),
                                  [](const auto& caller) { return caller->is_over(); }),
                   callers_.end());
  }

  const ServerProfile& profile_;
  const std::vector<LoadRequest>& requests_;
  const SimulationOptions& options_;

  JumpingClock clock_;
  const absl::Time began_;
  TimedEngine engine_;
  std::unique_ptr<server::StagingRing> ring_;
  server::Metrics metrics_;
  server::Progress progress_;
  server::EventCount wake_;
  server::KvPacker packer_;
  server::Scheduler scheduler_;

  size_t next_ = 0;  // request to come
  std::vector<std::unique_ptr<Caller>> callers_;
  std::vector<LoadEnd> ends_;
};

}  // namespace

absl::StatusOr<std::vector<LoadEnd>> Simulate(const ServerProfile& profile,
                                              const std::vector<LoadRequest>& requests,
                                              const SimulationOptions& options) {
  return Simulation(profile, requests, options).Run();
}

}  // namespace prefilld::bench
