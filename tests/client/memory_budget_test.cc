// Tests that calls which are made at once take no more memory than the process may make.
#include "client/memory_budget.h"

#include <atomic>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace prefilld::client {
namespace {

TEST(MemoryBudget, IsUsedUpAndComesBack) {
  MemoryBudget budget(100);
  auto first = budget.Take(60);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = budget.Take(41);
  EXPECT_TRUE(absl::IsResourceExhausted(second.status())) << second.status();
  EXPECT_THAT(second.status().message(), testing::HasSubstr("of the 100 bytes"));
  {
    const auto rest = budget.Take(40);
    EXPECT_TRUE(rest.ok()) << rest.status();
    EXPECT_FALSE(budget.Take(1).ok());
  }
  std::optional<MemoryBudget::Share> moved = *std::move(first);
  EXPECT_FALSE(budget.Take(41).ok()) << "it came back while its share was moved";
  moved.reset();
  EXPECT_TRUE(budget.Take(100).ok());
}

TEST(MemoryBudget, ThreadsTogetherTakeNoMore) {
  constexpr size_t kShares = 10;
  MemoryBudget budget(kShares);
  std::atomic<size_t> held = 0;
  std::atomic<bool> too_many = false;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 2000; ++round) {
        const auto share = budget.Take(3);
        if (!share.ok()) continue;
        if (++held > kShares / 3) too_many = true;
        --held;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(too_many);
  EXPECT_TRUE(budget.Take(kShares).ok()) << "not all came back";
}

}  // namespace
}  // namespace prefilld::client
