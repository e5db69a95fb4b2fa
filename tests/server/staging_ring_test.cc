#include "server/staging_ring.h"

#include <atomic>
#include <cstdint>
#include <set>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/server/fake_engine.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

constexpr auto kNever = [] { return false; };
constexpr auto kAtOnce = [] { return true; };

class StagingRingTest : public ::testing::Test {
 protected:
  std::unique_ptr<StagingRing> NewRing(int num_buffers,
                                       absl::Duration patience = absl::Milliseconds(1)) {
    auto ring = StagingRing::Create(engine_, num_buffers, 4096, patience);
    EXPECT_TRUE(ring.ok()) << ring.status();
    return *std::move(ring);
  }
  std::shared_ptr<StagingRing::Credit> NewCredit() {
    return std::make_shared<StagingRing::Credit>();
  }

  FakeEngine engine_{FakeEngineOptions()};
};

TEST_F(StagingRingTest, NumbersOfEveryTypeMayBeginWhereABufferDoes) {
  const auto ring = *StagingRing::Create(engine_, 4, 4097);
  EXPECT_EQ(ring->buffer_bytes(), 4160u);
  EXPECT_EQ(ring->capacity_bytes(), 4 * 4160);
  std::vector<StagingRing::Lease> leases;
  for (int i = 0; i < 4; ++i) {
    leases.push_back(ring->Acquire({NewCredit()}, kNever));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(leases.back().data()) % alignof(float), 0u);
  }
}

TEST_F(StagingRingTest, LendsDistinctBuffersAndTakesThemBack) {
  const auto ring = NewRing(4);
  std::set<std::byte*> addresses;
  {
    std::vector<StagingRing::Lease> leases;
    for (int i = 0; i < 4; ++i) {
      leases.push_back(ring->Acquire({NewCredit()}, kNever));
      ASSERT_TRUE(leases.back());
      addresses.insert(leases.back().data());
    }
    EXPECT_EQ(ring->staged_bytes(), 4 * 4096);
    EXPECT_FALSE(ring->AwaitIdle(absl::ZeroDuration()));
  }
  EXPECT_EQ(addresses.size(), 4);
  EXPECT_EQ(ring->staged_bytes(), 0);
  EXPECT_TRUE(ring->AwaitIdle(absl::ZeroDuration()));
}

TEST_F(StagingRingTest, ARequestGetsHalfAtMost) {
  const auto ring = NewRing(4);
  const auto greedy = NewCredit();
  StagingRing::Lease first = ring->Acquire({greedy}, kNever);
  const StagingRing::Lease second = ring->Acquire({greedy}, kNever);
  EXPECT_FALSE(ring->Acquire({greedy}, kAtOnce));
  EXPECT_TRUE(ring->Acquire({NewCredit()}, kAtOnce));
  first = StagingRing::Lease();
  EXPECT_TRUE(ring->Acquire({greedy}, kAtOnce));
}

TEST_F(StagingRingTest, AThirdRequestProceedsWhileTwoStandStill) {
  const auto ring = NewRing(6);
  const auto first = NewCredit(), second = NewCredit(), healthy = NewCredit();
  std::vector<StagingRing::Lease> stalled;
  for (const auto& credit : {first, second, first, second, first, second}) {
    if (auto lease = ring->Acquire({credit}, kAtOnce)) stalled.push_back(std::move(lease));
  }
  EXPECT_EQ(stalled.size(), 4);
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(ring->Acquire({healthy}, kAtOnce));
}

TEST_F(StagingRingTest, OfSeveralRequestsTheFirstThatHasRoomGetsIt) {
  const auto ring = NewRing(6);
  const auto full = NewCredit(), first = NewCredit(), second = NewCredit();
  std::vector<StagingRing::Lease> leases;
  for (int i = 0; i < 3; ++i) leases.push_back(ring->Acquire({full}, kNever));
  leases.push_back(ring->Acquire({full, first, second}, kNever));
  EXPECT_EQ(leases.back().credit(), first.get());
  leases.push_back(ring->Acquire({second, first, full}, kNever));
  EXPECT_EQ(leases.back().credit(), second.get());
  EXPECT_FALSE(ring->Acquire({full}, kAtOnce));
}

TEST_F(StagingRingTest, AWaitIsAskedAgainWhenTold) {
  const auto ring = NewRing(2, absl::InfiniteDuration());
  const auto credit = NewCredit();
  const StagingRing::Lease only = ring->Acquire({credit}, kNever);
  std::atomic<bool> asked = false, reason = false;
  std::thread waiting([&] {
    EXPECT_FALSE(ring->Acquire({credit}, [&] {
      asked = true;
      return reason.load();
    }));
  });
  EXPECT_TRUE(Eventually([&] { return asked.load(); }));
  reason = true;
  ring->AskAgain();
  waiting.join();
}

TEST_F(StagingRingTest, AWaitFindsAReasonToGiveUpByItself) {
  const auto ring = NewRing(2);
  const auto credit = NewCredit();
  const StagingRing::Lease only = ring->Acquire({credit}, kNever);
  int asked = 0;
  EXPECT_FALSE(ring->Acquire({credit}, [&] { return ++asked > 3; }));
}

TEST_F(StagingRingTest, ALeaseOutlivesTheCreditsOwner) {
  const auto ring = NewRing(2);
  auto credit = NewCredit();
  StagingRing::Lease lease = ring->Acquire({credit}, kNever);
  credit.reset();
  lease = StagingRing::Lease();
  EXPECT_EQ(ring->staged_bytes(), 0);
}

}  // namespace
}  // namespace prefilld::server
