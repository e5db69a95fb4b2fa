#include "server/standings.h"

#include <gtest/gtest.h>

#include "tests/server/job_harness.h"

namespace prefilld::server {
namespace {

constexpr auto kDense = model::AttentionPolicy::kDense;

class StandingsTest : public ::testing::Test {
 protected:
  std::unique_ptr<PrefillPass> PassAfter(int layers) {
    auto pass = bench_.NewPass({bench_.NewJob(100)});
    for (int i = 0; i < layers; ++i) EXPECT_TRUE(pass->Step().ok());
    return pass;
  }

  Bench bench_;
  Standings standings_{
      bench_.engine.info(), {Tenant()}, bench_.metrics.tenants(), Scheduling::kTurns};
};

TEST_F(StandingsTest, LearnFromFirstLayersOnlyWhatIsNotKnown) {
  standings_.RecordLayer(*PassAfter(1), absl::Milliseconds(80));
  EXPECT_EQ(standings_.costs().Layer(kDense, 100), absl::Milliseconds(80)) << "nothing was known";
  standings_.RecordLayer(*PassAfter(1), absl::Milliseconds(500));
  EXPECT_EQ(standings_.costs().Layer(kDense, 100), absl::Milliseconds(80));
  standings_.RecordLayer(*PassAfter(2), absl::Milliseconds(40));
  EXPECT_LT(standings_.costs().Layer(kDense, 100), absl::Milliseconds(80));
}

TEST_F(StandingsTest, PutAPassThatOnlyDeliversBeforeAllOthers) {
  standings_.shares().SetClaimants({}, bench_.clock.Now());
  const absl::Time now = bench_.clock.Now();
  const auto computes = PassAfter(2);
  const auto delivers = bench_.NewPass({bench_.NewJob(100)});
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(delivers->Step().ok());
    bench_.PackAll();
  }
  bench_.clock.Advance(absl::Hours(1));
  EXPECT_TRUE(standings_.GoesBefore(standings_.OfPass(*delivers, now, bench_.clock.Now()),
                                    standings_.OfPass(*computes, now, bench_.clock.Now())));
}

TEST_F(StandingsTest, CountABatchAsAStepOfItsHighestClass) {
  PrefillWork urgent = WorkOf(bench_.engine, 100);
  urgent.priority = 7;
  const std::vector<std::shared_ptr<PrefillJob>> high = {
      std::make_shared<PrefillJob>(std::move(urgent), bench_.clock)};
  const std::vector<std::shared_ptr<PrefillJob>> low = {bench_.NewJob(100)};
  JobShares& shares = standings_.shares();
  shares.SetClaimants({high[0].get(), low[0].get()}, bench_.clock.Now());
  bench_.clock.Advance(absl::Seconds(3));
  shares.EndStep({low[0], high[0]}, bench_.clock.Now(), absl::Seconds(1));
  EXPECT_EQ(shares.StandingOf(high, bench_.clock.Now()).class_waited, absl::ZeroDuration());
  EXPECT_EQ(shares.StandingOf(low, bench_.clock.Now()).class_waited, absl::Seconds(3));
}

}  // namespace
}  // namespace prefilld::server
