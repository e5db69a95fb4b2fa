#include "server/watchdog.h"

#include <map>

#include <grpcpp/health_check_service_interface.h>
#include <gtest/gtest.h>

#include "proto/process/health.h"
#include "server/scheduler.h"
#include "tests/server/job_harness.h"

namespace prefilld::server {
namespace {

// Remembers the states that the services were set to.
class FakeHealthService final : public grpc::HealthCheckServiceInterface {
 public:
  void SetServingStatus(const std::string& service, bool serving) override {
    serving_[service] = serving;
  }
  void SetServingStatus(bool serving) override {
    for (auto& [service, is_serving] : serving_) is_serving = serving;
  }
  bool serving(const std::string& service) { return serving_[service]; }

 private:
  std::map<std::string, bool> serving_;
};

class WatchdogTest : public ::testing::Test {
 protected:
  WatchdogTest() { health_.SetReady(true); }

  std::shared_ptr<PrefillJob> Submit(int num_tokens) {
    const auto job = bench_.NewJob(num_tokens);
    EXPECT_TRUE(scheduler_.Submit(job).status.ok());
    return job;
  }

  static constexpr absl::Duration kWedgeTimeout = absl::Seconds(300);

  Bench bench_;
  Scheduler scheduler_{bench_.engine, bench_.resources, bench_.wake,
                       QueueLimits{.capacity = 4, .max_queued_tokens = 100'000}};
  FakeHealthService service_;
  process::Health health_{&service_, {"prefill.v1.PrefillService"}};
  Watchdog watchdog_{{.engine = &bench_.engine,
                      .ring = bench_.ring.get(),
                      .progress = &bench_.progress,
                      .scheduler = &scheduler_,
                      .health = &health_,
                      .metrics = &bench_.metrics},
                     bench_.clock,
                     bench_.resources.timeouts,
                     kWedgeTimeout};
};

TEST_F(WatchdogTest, AWedgeIsReportedOnlyWhileWorkWaits) {
  bench_.clock.Advance(2 * kWedgeTimeout);
  watchdog_.LookAround();
  EXPECT_TRUE(service_.serving("liveness")) << "an idle server is not wedged";

  const auto job = Submit(100);
  bench_.clock.Advance(kWedgeTimeout);
  watchdog_.LookAround();
  EXPECT_TRUE(service_.serving("liveness"));
  bench_.clock.Advance(absl::Milliseconds(1));
  watchdog_.LookAround();
  EXPECT_FALSE(service_.serving("liveness"));
  EXPECT_TRUE(service_.serving("prefill.v1.PrefillService")) << "readiness is another matter";

  while (scheduler_.StepOnce()) bench_.PackAll();
  watchdog_.LookAround();
  EXPECT_TRUE(service_.serving("liveness"));
}

TEST_F(WatchdogTest, AFrameThatIsTakenIsProgressToo) {
  const auto job = Submit(100);
  Consumer consumer(job);
  scheduler_.StepOnce();
  scheduler_.StepOnce();
  bench_.clock.Advance(kWedgeTimeout - absl::Seconds(1));
  EXPECT_TRUE(bench_.packer.PackOne());
  bench_.clock.Advance(absl::Seconds(2));
  watchdog_.LookAround();
  EXPECT_TRUE(service_.serving("liveness"));
}

TEST_F(WatchdogTest, ChecksTheTimersOfRequestsThatWait) {
  PrefillWork work = WorkOf(bench_.engine, 100);
  work.deadline = bench_.clock.Now() + absl::Seconds(1);
  const auto job = std::make_shared<PrefillJob>(std::move(work), bench_.clock);
  ASSERT_TRUE(scheduler_.Submit(job).status.ok());
  bench_.clock.Advance(absl::Seconds(1));
  watchdog_.LookAround();
  EXPECT_EQ(job->ending().outcome, Outcome::kDeadline);
}

TEST_F(WatchdogTest, AFailedDeviceIsNotReady) {
  bench_.engine.FailFrom(0, absl::InternalError("an illegal memory access"));
  const auto job = Submit(100);
  while (scheduler_.StepOnce()) {
  }
  watchdog_.LookAround();
  EXPECT_FALSE(service_.serving("prefill.v1.PrefillService"));
  EXPECT_TRUE(service_.serving("liveness")) << "nothing waits any more";
}

}  // namespace
}  // namespace prefilld::server
