#include "server/tenants.h"

#include <gmock/gmock.h>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace prefilld::server {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// SHA-256 of "abc", from FIPS 180-2.
constexpr char kHashOfAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

std::string ProblemsOf(const std::string& json) {
  const auto tenants = Tenants::Parse(json);
  EXPECT_EQ(tenants.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(tenants.status().message());
}

TEST(Tenants, WithoutAFileAreTheDefaultOneAlone) {
  const Tenants tenants;
  ASSERT_EQ(tenants.all().size(), 1);
  EXPECT_EQ(tenants.all()[0].name, "default");
  EXPECT_EQ(tenants.ByName("anyone"), 0);
}

TEST(Tenants, AreReadWithTheirSettings) {
  const auto tenants = Tenants::Parse(absl::StrCat(R"({"tenants": [
      {"name": "search", "weight": 2.5, "max_priority": 3, "max_requests": 16,
       "max_queued_tokens": 500000, "tokens_per_second": 20000.5,
       "token_sha256": [")",
                                                   kHashOfAbc, R"("]},
      {"name": "batch"}]})"));
  ASSERT_TRUE(tenants.ok()) << tenants.status();
  ASSERT_EQ(tenants->all().size(), 3);
  const Tenant& search = tenants->all()[0];
  EXPECT_EQ(search.name, "search");
  EXPECT_EQ(search.weight, 2.5);
  EXPECT_EQ(search.max_priority, 3);
  EXPECT_EQ(search.max_requests, 16);
  EXPECT_EQ(search.max_queued_tokens, 500'000);
  EXPECT_EQ(search.tokens_per_second, 20000.5);
  const Tenant& batch = tenants->all()[1];
  EXPECT_EQ(batch.weight, 1);
  EXPECT_EQ(batch.max_priority, 0);
  EXPECT_EQ(batch.max_requests, 0);
  EXPECT_EQ(tenants->all()[2].name, "default");
  EXPECT_EQ(tenants->ByName("batch"), 1);
  EXPECT_EQ(tenants->ByName("nobody"), 2);
  EXPECT_EQ(tenants->ByToken("abc"), 0);
  EXPECT_EQ(tenants->ByToken("abd"), 2);
  EXPECT_EQ(tenants->ByToken(kHashOfAbc), 2) << "the hash is no token";
}

TEST(Tenants, TheFileMaySayWhatStrangersGet) {
  const auto named =
      Tenants::Parse(R"({"tenants": [{"name": "a"}, {"name": "default", "weight": 9}]})");
  ASSERT_TRUE(named.ok()) << named.status();
  EXPECT_EQ(named->all().size(), 2);
  EXPECT_EQ(named->ByName("nobody"), 1);
  const auto refusing = Tenants::Parse(R"({"unknown": "refuse", "tenants": [{"name": "a"}]})");
  ASSERT_TRUE(refusing.ok()) << refusing.status();
  EXPECT_EQ(refusing->all().size(), 1);
  EXPECT_EQ(refusing->ByName("nobody"), std::nullopt);
  EXPECT_EQ(refusing->ByName(""), std::nullopt);
  EXPECT_EQ(refusing->ByToken(""), std::nullopt);
}

TEST(Tenants, EveryProblemIsListedByNameAndLimit) {
  EXPECT_THAT(
      ProblemsOf(R"({"unknown": "drop", "limits": {}, "tenants": [
      {"name": "a", "weight": 0, "max_priority": 9, "max_requests": 1.5, "wieght": 2},
      {"name": "a", "tokens_per_second": "many", "token_sha256": ["ab", 3]}, 7, {"weight": 1}]})"),
      AllOf(HasSubstr("unknown is \"drop\"; default or refuse"),
            HasSubstr("the file: unknown field \"limits\""),
            HasSubstr("tenant \"a\": weight is 0; a number from 1e-06 to 1e+06"),
            HasSubstr("max_priority is 9; a number from -7 to 7"),
            HasSubstr("max_requests is 1.5; a whole number"), HasSubstr("unknown field \"wieght\""),
            HasSubstr("the name is there twice"), HasSubstr("tokens_per_second is \"many\""),
            HasSubstr("a token_sha256 is not of 64 hexadecimal digits"),
            HasSubstr("tenants[2] is 7; an object"),
            HasSubstr("tenants[3]: name has 0 bytes; 1 to 128 printable ASCII")));
}

TEST(Tenants, ATokenBelongsToOneTenant) {
  EXPECT_THAT(ProblemsOf(absl::StrCat(R"({"tenants": [{"name": "a", "token_sha256": [")",
                                      kHashOfAbc, R"("]}, {"name": "b", "token_sha256": [")",
                                      absl::AsciiStrToUpper(kHashOfAbc), R"("]}]})")),
              HasSubstr("tenant \"b\": a token_sha256 is there twice"));
}

TEST(Tenants, AreBoundedInNumberAndNames) {
  std::string list;
  for (size_t i = 0; i <= Tenants::kMaxTenants; ++i) {
    absl::StrAppend(&list, i == 0 ? "" : ",", R"({"name": "t)", i, R"("})");
  }
  EXPECT_THAT(ProblemsOf(absl::StrCat(R"({"tenants": [)", list, "]}")),
              HasSubstr("tenants is not a list of 1 to 256 tenants"));
  EXPECT_THAT(ProblemsOf(R"({"tenants": []})"), HasSubstr("not a list of 1 to 256"));
  EXPECT_THAT(
      ProblemsOf(absl::StrCat(R"({"tenants": [{"name": ")", std::string(129, 'x'), R"("}]})")),
      HasSubstr("name has 129 bytes"));
}

TEST(Tenants, WhatIsNoJsonIsRefused) {
  EXPECT_THAT(ProblemsOf("tenants: []"), HasSubstr("not a JSON object"));
  EXPECT_EQ(Tenants::Read("/no/such/file").status(),
            absl::NotFoundError("/no/such/file cannot be read"));
}

constexpr absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);

TEST(CheckTenantUse, BoundsTheRequestsUnderWay) {
  const Tenant tenant = {.name = "search", .max_requests = 3};
  EXPECT_TRUE(CheckTenantUse(tenant, {.requests = 2}, 10).ok());
  EXPECT_EQ(CheckTenantUse(tenant, {.requests = 3}, 10),
            absl::ResourceExhaustedError(
                "tenant search: 3 requests are under way; at most 3 (max_requests)"));
}

TEST(CheckTenantUse, CountsARequestOnceForEachReceiver) {
  Tenant tenant;
  tenant.name = "a";
  tenant.max_requests = 3;
  EXPECT_TRUE(CheckTenantUse(tenant, {.requests = 1}, 10, /*num_requests=*/2).ok());
  EXPECT_EQ(
      CheckTenantUse(tenant, {.requests = 2}, 10, /*num_requests=*/2),
      absl::ResourceExhaustedError("tenant a: 2 requests are under way and one of 2 receivers "
                                   "came; at most 3 (max_requests)"));
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
