#include "server/resumable_jobs.h"

#include <memory>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include "absl/strings/str_cat.h"
#include "proto/wire/sealed_memory.h"
#include "server/resumption_metrics.h"
#include "server/shared_memory_use.h"
#include "server/shared_region.h"
#include "tests/server/job_harness.h"

namespace prefilld::server {
namespace {

class NoTransport final : public Transport {
 public:
  void Send(Message, bool) override {}
  void End(const absl::Status&) override {}
  void Cancel(const absl::Status&) override { ++cancelled; }

  int cancelled = 0;
};

class ResumableJobsTest : public ::testing::Test {
 protected:
  std::shared_ptr<PrefillJob> AddJob(const std::string& id, int tenant = 0) {
    PrefillWork work = WorkOf(bench_.engine, 10, id);
    work.tenant = tenant;
    work.resume_key = "a secret of the caller's";
    work.resume_window = absl::Seconds(10);
    auto job = std::make_shared<PrefillJob>(std::move(work), bench_.clock);
    jobs_.Add(job);
    job->delivery().control().Attach(&transport_);
    return job;
  }
  void Leave(PrefillJob& job) {
    job.delivery().control().OnPeerGone(&transport_);
    bench_.clock.Advance(absl::Milliseconds(1));
  }

  Bench bench_;
  NoTransport transport_;
  std::set<std::string> over_;
  ResumableJobs jobs_{bench_.metrics.resumption(), bench_.clock, *bench_.ring,
                      [this](PrefillJob& job) { over_.insert(job.work().id); }};
};

TEST_F(ResumableJobsTest, APushWhoseReceiverIsAwayCountsAsOneThatWaits) {
  std::vector<std::shared_ptr<PrefillJob>> pushes;
  std::vector<NoTransport> lanes(ResumableJobs::kMaxWaitingOfTenant + 1);
  for (NoTransport& lane : lanes) {
    PrefillWork work = WorkOf(bench_.engine, 10, absl::StrCat("p", pushes.size()));
    work.deliver_to.set_address("decode:1");
    work.resume_window = absl::Seconds(10);
    pushes.push_back(std::make_shared<PrefillJob>(std::move(work), bench_.clock));
    jobs_.AddPush(pushes.back());
    LaneQueue& queue = **pushes.back()->delivery().side_lane(0);
    queue.Attach(&lane);
    queue.OnPeerGone(&lane);
    bench_.clock.Advance(absl::Milliseconds(1));
  }
  jobs_.LookAround();
  EXPECT_EQ(pushes.back()->ending().outcome, Outcome::kNotResumed);
  EXPECT_EQ(pushes.back()->ending().status.code(), absl::StatusCode::kResourceExhausted);
  pushes.pop_back();
  for (const auto& push : pushes) EXPECT_FALSE(push->ended());
  // The dialer, and not the watchdog, knows when to give up.
  bench_.clock.Advance(absl::Seconds(11));
  pushes.front()->CheckTimers({}, 0, false);
  EXPECT_FALSE(pushes.front()->ended());
  for (const auto& push : pushes) push->Abort(Outcome::kCancelled, absl::CancelledError("over"));
}

TEST_F(ResumableJobsTest, AJobIsOverWhenItHasEndedAndItsStreamToo) {
  const auto job = AddJob("a");
  EXPECT_TRUE(job->outlives_call());
  jobs_.LookAround();
  Leave(*job);
  jobs_.LookAround();
  EXPECT_TRUE(over_.empty());
  bench_.clock.Advance(absl::Seconds(11));
  job->CheckTimers({}, 0, false);
  EXPECT_EQ(job->ending().outcome, Outcome::kNotResumed);
  jobs_.LookAround();
  EXPECT_EQ(over_, std::set<std::string>({"a"}));
  over_.clear();
  jobs_.LookAround();
  EXPECT_TRUE(over_.empty()) << "it was over before";
}

TEST_F(ResumableJobsTest, OfTooManyThatWaitThoseThatCameLastAreEnded) {
  std::vector<std::shared_ptr<PrefillJob>> jobs;
  for (size_t i = 0; i < ResumableJobs::kMaxWaiting + 2; ++i)
    jobs.push_back(AddJob(absl::StrCat(i), i % 4));
  jobs_.LookAround();
  for (const auto& job : jobs) Leave(*job);
  jobs_.LookAround();
  for (size_t i = 0; i < jobs.size(); ++i) {
    EXPECT_EQ(jobs[i]->ended(), i >= ResumableJobs::kMaxWaiting) << i;
  }
  EXPECT_EQ(jobs.back()->ending().outcome, Outcome::kNotResumed);
  EXPECT_EQ(jobs.back()->ending().status.code(), absl::StatusCode::kResourceExhausted);
  jobs_.LookAround();
  EXPECT_EQ(over_.size(), 2);
  for (const auto& job : jobs) job->Abort(Outcome::kCancelled, absl::CancelledError("enough"));
  jobs_.LookAround();
  EXPECT_EQ(over_.size(), jobs.size());
}

TEST_F(ResumableJobsTest, OfOneTenantFewerMayWait) {
  std::vector<std::shared_ptr<PrefillJob>> jobs;
  for (size_t i = 0; i < ResumableJobs::kMaxWaitingOfTenant + 1; ++i) {
    jobs.push_back(AddJob(absl::StrCat(i)));
    Leave(*jobs.back());
  }
  const auto of_another = AddJob("other", 1);
  Leave(*of_another);
  jobs_.LookAround();
  for (size_t i = 0; i < jobs.size(); ++i) {
    EXPECT_EQ(jobs[i]->ended(), i >= ResumableJobs::kMaxWaitingOfTenant) << i;
  }
  EXPECT_FALSE(of_another->ended());
  for (const auto& job : jobs) job->Abort(Outcome::kCancelled, absl::CancelledError("enough"));
  of_another->Abort(Outcome::kCancelled, absl::CancelledError("enough"));
  jobs_.LookAround();
}

TEST_F(ResumableJobsTest, FramesInTheirConsumersMemoryAreNoStagingMemory) {
  constexpr size_t kBuffer = 16'384, kBytes = 4 * kBuffer;
  const auto use = std::make_shared<SharedMemoryUse>(SharedMemoryUse::Limits{kBytes, 1});
  auto memory = SharedRegion::Map(bench_.engine, *SharedMemoryUse::Take(use, /*tenant=*/0, kBytes),
                                  *wire::MakeSealedMemory(kBytes), kBytes, kBuffer);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto own = std::make_shared<StagingRing::Credit>();
  const auto lent = std::make_shared<StagingRing::Credit>();
  bench_.ring->Lend(*lent, *memory);
  const auto job = AddJob("a");
  for (const auto& credit : {own, lent, lent, own, lent}) {
    KvFrame frame;
    frame.payload =
        std::make_shared<StagingRing::Lease>(bench_.ring->Acquire({credit}, [] { return true; }));
    job->delivery().SendFrame(std::move(frame));
  }
  job->delivery().control().OnWriteDone(true);  // of the first, and the second is under way
  job->delivery().control().OnWriteDone(true);
  Leave(*job);
  job->delivery().control().OnWriteDone(false);
  bench_.clock.Advance(absl::Milliseconds(1));
  jobs_.LookAround();
  const auto value = [this](const std::string& name) -> double {
    for (const auto& family : bench_.metrics.registry()->Collect()) {
      if (family.name == name) return family.metric.at(0).gauge.value;
    }
    return -1;
  };
  EXPECT_EQ(value("prefilld_waiting_for_consumer"), 1);
  EXPECT_EQ(value("prefilld_kv_frames_retained"), 5);
  EXPECT_EQ(value("prefilld_waiting_for_consumer_bytes"), 2 * bench_.ring->buffer_bytes());
  job->Abort(Outcome::kCancelled, absl::CancelledError("enough"));
  jobs_.LookAround();
}

// A write that nobody takes has its frame's buffer.
TEST_F(ResumableJobsTest, AJobThatIsCompleteBreaksOffWhatIsStillWritten) {
  const auto job = AddJob("a");
  job->delivery().SendResult({});
  EXPECT_EQ(transport_.cancelled, 0);
  ASSERT_TRUE(job->Complete().ok());
  EXPECT_TRUE(job->ended());
  EXPECT_EQ(transport_.cancelled, 1);
  job->delivery().control().OnWriteDone(false);
  jobs_.LookAround();
  EXPECT_EQ(over_, std::set<std::string>({"a"}));
}

}  // namespace
}  // namespace prefilld::server
