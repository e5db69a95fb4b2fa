// Tests what consumers' memories are charged for, and that no tenant takes all.
#include "server/shared_memory_use.h"

#include <memory>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;
using Shares = std::vector<SharedMemoryUse::Share>;

std::shared_ptr<SharedMemoryUse> NewUse(const SharedMemoryUse::Limits& limits) {
  return std::make_shared<SharedMemoryUse>(limits);
}

// Takes as many as a tenant gets of `bytes` each.
Shares TakeAll(const std::shared_ptr<SharedMemoryUse>& use, int tenant, int64_t bytes) {
  Shares shares;
  while (true) {
    auto share = SharedMemoryUse::Take(use, tenant, bytes);
    if (!share.ok()) {
      EXPECT_TRUE(absl::IsResourceExhausted(share.status())) << share.status();
      return shares;
    }
    shares.push_back(*std::move(share));
  }
}

TEST(SharedMemoryUse, AllMemoriesTogetherKeepTheLimits) {
  const auto by_bytes = NewUse({.bytes = 100, .attachments = 50});
  Shares shares = TakeAll(by_bytes, 0, 30);
  EXPECT_EQ(shares.size(), 3u);
  EXPECT_THAT(SharedMemoryUse::Take(by_bytes, 1, 30).status().message(),
              HasSubstr("bytes 30: of 100 for all consumers 90 are taken"));
  shares.pop_back();
  EXPECT_EQ(by_bytes->total().bytes, 60);
  EXPECT_TRUE(SharedMemoryUse::Take(by_bytes, 1, 30).ok());

  const auto by_number = NewUse({.bytes = 1000, .attachments = 4});
  EXPECT_EQ(TakeAll(by_number, 0, 1).size(), 4u);
  EXPECT_EQ(by_number->total().attachments, 0) << "they were given back";
}

TEST(SharedMemoryUse, ATenantLeavesAsMuchForOthersAsItHas) {
  const auto use = NewUse({.bytes = 120, .attachments = 1000, .is_shared_by_tenants = true});
  const Shares first = TakeAll(use, 1, 1);
  EXPECT_EQ(first.size(), 60u);
  const Shares second = TakeAll(use, 2, 1);
  EXPECT_EQ(second.size(), 30u);
  EXPECT_EQ(TakeAll(use, 3, 1).size(), 15u);

  const auto numbers = NewUse({.bytes = 1000, .attachments = 12, .is_shared_by_tenants = true});
  EXPECT_EQ(TakeAll(numbers, 1, 1).size(), 6u);
}

TEST(SharedMemoryUse, AMemoryGoesOverToTheTenantOfItsNextRequest) {
  const auto use = NewUse({.bytes = 100, .attachments = 10, .is_shared_by_tenants = true});
  auto moved = *SharedMemoryUse::Take(use, 1, 40);
  const auto other = *SharedMemoryUse::Take(use, 2, 20);
  EXPECT_TRUE(absl::IsResourceExhausted(moved.MoveTo(2))) << "60 with 40 left";
  EXPECT_TRUE(moved.MoveTo(3).ok());
  EXPECT_EQ(use->total().bytes, 60);
  EXPECT_TRUE(SharedMemoryUse::Take(use, 1, 20).ok()) << "the first one has none any more";
}

}  // namespace
}  // namespace prefilld::server
