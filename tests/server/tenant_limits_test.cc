#include "server/tenant_limits.h"

#include <gmock/gmock.h>

namespace prefilld::server {
namespace {

constexpr absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);

TEST(CheckTenantUse, BoundsTheRequestsUnderWay) {
  const Tenant tenant = {.name = "search", .max_requests = 3};
  EXPECT_TRUE(CheckTenantUse(tenant, {.requests = 2}, 10).ok());
  EXPECT_EQ(CheckTenantUse(tenant, {.requests = 3}, 10),
            absl::ResourceExhaustedError(
                "tenant search: 3 requests are under way; at most 3 (max_requests)"));
}

TEST(CheckTenantUse, BoundsTheTokensThatWaitButForTheFirst) {
  const Tenant tenant = {.name = "search", .max_queued_tokens = 1000};
  EXPECT_TRUE(CheckTenantUse(tenant, {}, 5000).ok());
  EXPECT_TRUE(CheckTenantUse(tenant, {.queued_tokens = 900}, 100).ok());
  EXPECT_EQ(CheckTenantUse(tenant, {.queued_tokens = 900}, 101),
            absl::ResourceExhaustedError(
                "tenant search: 900 tokens wait and 101 came; at most 1000 (max_queued_tokens)"));
}

TEST(CheckTenantUse, SetsNoLimitThatIsNotNamed) {
  EXPECT_TRUE(CheckTenantUse({}, {.requests = 1 << 20, .queued_tokens = 1 << 30}, 1 << 20).ok());
}

TEST(TokenBucket, IsFullAtFirstAndFillsAtItsRate) {
  TokenBucket bucket(100);
  EXPECT_EQ(bucket.WaitFor(1000, kNow), absl::ZeroDuration());
  bucket.Take(1000, kNow);
  EXPECT_EQ(bucket.WaitFor(200, kNow), absl::Seconds(2));
  EXPECT_EQ(bucket.WaitFor(200, kNow + absl::Seconds(2)), absl::ZeroDuration());
}

TEST(TokenBucket, NeverHoldsMoreThanItsBurst) {
  TokenBucket bucket(100);
  bucket.Take(1000, kNow);
  const absl::Time later = kNow + absl::Hours(1);
  bucket.Take(1000, later);
  EXPECT_GT(bucket.WaitFor(1, later), absl::ZeroDuration());
}

TEST(TokenBucket, ALongPromptNeedsAFullBucketAndLeavesADebt) {
  TokenBucket bucket(100);
  bucket.Take(1, kNow);
  EXPECT_EQ(bucket.WaitFor(5000, kNow), absl::Milliseconds(10));
  const absl::Time full = kNow + absl::Milliseconds(10);
  EXPECT_EQ(bucket.WaitFor(5000, full), absl::ZeroDuration());
  bucket.Take(5000, full);
  EXPECT_EQ(bucket.WaitFor(100, full), absl::Seconds(41));
}

TEST(TokenBucket, OfRateZeroSetsNoLimit) {
  TokenBucket bucket(0);
  bucket.Take(1 << 20, kNow);
  EXPECT_EQ(bucket.WaitFor(1 << 20, kNow), absl::ZeroDuration());
}

TEST(CheckTenantRate, NamesTenantValueAndLimit) {
  TokenBucket bucket(100);
  bucket.Take(1000, kNow);
  EXPECT_EQ(CheckTenantRate({.name = "search", .tokens_per_second = 100}, bucket, 150, kNow),
            absl::ResourceExhaustedError("tenant search: 150 tokens came 1.5s too soon; at most "
                                         "100 a second (tokens_per_second)"));
}

}  // namespace
}  // namespace prefilld::server
