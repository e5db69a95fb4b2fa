// Jobs, their consumers and a scheduler without sockets, and a clock that stands still unless a
// test moves it.
#ifndef PREFILLD_TESTS_SERVER_JOB_HARNESS_H_
#define PREFILLD_TESTS_SERVER_JOB_HARNESS_H_

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "prefill/v1/prefill.pb.h"
#include "proto/status_macros.h"
#include "server/clock.h"
#include "server/event_count.h"
#include "server/kv_packer.h"
#include "server/lane_queue.h"
#include "server/metrics.h"
#include "server/prefill_job.h"
#include "server/prefill_pass.h"
#include "server/scheduler.h"
#include "server/staging_ring.h"
#include "server/transport.h"
#include "tests/server/fake_engine.h"

namespace prefilld::server {

class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::FromUnixMicros(now_us_); }
  void Advance(absl::Duration by) { now_us_ += absl::ToInt64Microseconds(by); }

 private:
  std::atomic<int64_t> now_us_ = 1'000'000'000'000'000;
};

// Makes a dense prompt of `num_tokens` tokens for the fake engine's model, with every default
// resolved.
PrefillWork WorkOf(const FakeEngine& engine, int num_tokens, const std::string& id = "");

// Takes what a stream sends, at once unless it is told to hold still.
class Consumer final : public Transport {
 public:
  // Attaches itself to the job's control stream, or to one of its lanes.
  explicit Consumer(std::shared_ptr<PrefillJob> job, uint32_t lane = 0);

  // Takes nothing from now on.
  void HoldStill() { holds_still_ = true; }
  // Takes what came meanwhile, and everything after it.
  void GoOn();
  // Takes one of the messages that wait.
  void TakeOne();

  std::vector<::prefill::v1::KvFrame> frames() const;
  const ::prefill::v1::PrefillResult* result() const;  // null: none came
  int num_progress() const;                            // progress events
  const std::optional<absl::Status>& end() const { return end_; }

  void Send(Message message, bool last) override;
  void End(const absl::Status& status) override;
  void Cancel(const absl::Status& status) override { cancelled_ = true; }

 private:
  const std::shared_ptr<PrefillJob> job_;
  const uint32_t lane_;
  LaneQueue* const queue_;
  std::vector<::prefill::v1::PrefillEvent> events_;
  std::optional<absl::Status> end_;
  Message message_;  // under way
  bool holds_still_ = false;
  bool writing_ = false;
  bool cancelled_ = false;
};

// All that a pass works with, over a fake engine and a fake clock. By default there are no packing
// threads, and the test packs.
struct Bench {
  explicit Bench(const FakeEngineOptions& options = {}, int num_buffers = 64, int pack_threads = 0,
                 const std::vector<Tenant>& tenants = {Tenant()});

  // Packs and sends all that can be packed.
  void PackAll() {
    while (packer.PackOne()) {
    }
  }
  std::shared_ptr<PrefillJob> NewJob(int num_tokens, const std::string& id = "");
  // Makes a job that has another receiver, and that one, which has not joined it. The first takes
  // head 0 and the other head 1.
  struct Shared {
    std::shared_ptr<PrefillJob> first, other;
  };
  Shared NewShared(int num_tokens);
  std::unique_ptr<PrefillPass> NewPass(std::vector<std::shared_ptr<PrefillJob>> jobs);

  FakeClock clock;
  FakeEngine engine;
  std::unique_ptr<StagingRing> ring;  // each buffer holds one block
  Metrics metrics;
  Progress progress{clock};
  EventCount wake;
  KvPacker packer;
  PassResources resources;
};

inline constexpr absl::Duration kLayerTime = absl::Milliseconds(250);  // of 2000 tokens

// A request's control stream, as the service holds it.
struct Call {
  std::shared_ptr<PrefillJob> job;
  std::unique_ptr<Consumer> consumer;
};

// A scheduler over a fake engine whose layers take kLayerTime for 2000 tokens.
class SchedulerTest : public ::testing::Test {
 protected:
  explicit SchedulerTest(const FakeEngineOptions& options = {.max_batch_tokens = 1000})
      : bench_(options, /*num_buffers=*/32) {
    bench_.engine.set_on_layer(
        [this](int64_t num_tokens) { bench_.clock.Advance(num_tokens * kLayerTime / 2000); });
  }

  absl::StatusOr<Call> Submit(PrefillWork work) {
    auto job = std::make_shared<PrefillJob>(std::move(work), bench_.clock);
    PREFILLD_RETURN_IF_ERROR(scheduler_.Submit(job).status);
    return Call{job, std::make_unique<Consumer>(job)};
  }
  absl::StatusOr<Call> Submit(int num_tokens, absl::Duration deadline = absl::InfiniteDuration(),
                              const std::string& id = "") {
    PrefillWork work = WorkOf(bench_.engine, num_tokens, id);
    work.deadline = bench_.clock.Now() + deadline;
    return Submit(std::move(work));
  }
  // Computes and packs until nothing is left to do.
  void Run() {
    do {
      bench_.PackAll();
    } while (scheduler_.StepOnce());
  }
  void Retire(Call& call) { scheduler_.Retire(*call.job); }

  Bench bench_;
  Scheduler scheduler_{bench_.engine, bench_.resources, bench_.wake,
                       QueueLimits{.capacity = 4, .max_queued_tokens = 100'000}};
};

}  // namespace prefilld::server

#endif  // PREFILLD_TESTS_SERVER_JOB_HARNESS_H_
