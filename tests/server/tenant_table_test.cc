#include "server/tenants.h"

#include <gmock/gmock.h>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace prefilld::server {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// SHA-256 of "abc", from FIPS 180-2.
constexpr char kHashOfAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

// A status without its cause (refusal_cause.h).
absl::Status Plain(const absl::Status& status) { return {status.code(), status.message()}; }

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

TEST(Tenants, AFileThatSaysNothingOfStrangersLeavesThemToTheServer) {
  constexpr char kSaysNothing[] = R"({"tenants": [{"name": "a"}, {"name": "default"}]})";
  EXPECT_EQ(Tenants::Parse(kSaysNothing, Strangers::kRefused)->ByName("nobody"), std::nullopt);
  EXPECT_EQ(Tenants::Parse(kSaysNothing, Strangers::kDefaultTenant)->ByName("nobody"), 1);
  const auto says =
      Tenants::Parse(R"({"unknown": "default", "tenants": [{"name": "a"}]})", Strangers::kRefused);
  EXPECT_EQ(says->ByName("nobody"), 1);
}

TEST(Tenants, AnEmptyTokenIsNobodys) {
  constexpr char kHashOfNothing[] =
      "E3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
  EXPECT_THAT(ProblemsOf(absl::StrCat(R"({"tenants": [{"name": "a", "token_sha256": [")",
                                      kHashOfNothing, R"("]}]})")),
              HasSubstr("tenant \"a\": a token_sha256 is that of an empty token"));
  EXPECT_EQ(Tenants::Parse(R"({"tenants": [{"name": "a"}]})")->ByToken(""), 1);
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
  EXPECT_EQ(Tenants::Read("/no/such/file", Strangers::kDefaultTenant).status(),
            absl::NotFoundError("/no/such/file cannot be read"));
}

TEST(Tenants, MayHaveRulesForWhatTheirRequestsAskFor) {
  const auto tenants = Tenants::Parse(R"({"tenants": [
      {"name": "a", "policies": ["dense", "auto"], "max_lanes": 4, "deliver_to": ["*.pods:7000"],
       "certificates": ["worker-a"]}, {"name": "b", "pushes": false}]})");
  ASSERT_TRUE(tenants.ok()) << tenants.status();
  const Tenant& a = tenants->all()[0];
  EXPECT_THAT(a.policies,
              ElementsAre(model::AttentionPolicy::kDense, model::AttentionPolicy::kAuto));
  EXPECT_EQ(a.max_lanes, 4);
  EXPECT_TRUE(a.pushes);
  EXPECT_THAT(a.deliver_to, ElementsAre("*.pods:7000"));
  EXPECT_THAT(a.certificates, ElementsAre("worker-a"));
  const Tenant& b = tenants->all()[1];
  EXPECT_TRUE(b.policies.empty());
  EXPECT_EQ(b.max_lanes, 0);
  EXPECT_FALSE(b.pushes);
}

TEST(Tenants, RulesThatAreNoneAreRefused) {
  EXPECT_THAT(ProblemsOf(R"({"tenants": [{"name": "a", "policies": ["fast"], "max_lanes": 17,
                             "deliver_to": ["*"], "pushes": 1, "certificates": []}]})"),
              AllOf(HasSubstr("policies has 'fast'; one of dense"),
                    HasSubstr("max_lanes is 17; a number from 0 to 16"), HasSubstr("deliver_to: "),
                    HasSubstr("pushes is 1; true or false"),
                    HasSubstr("certificates is an empty list; at least one text")));
  EXPECT_THAT(ProblemsOf(R"({"tenants": [{"name": "a", "pushes": false,
                             "deliver_to": ["*.pods:7000"]}]})"),
              HasSubstr("deliver_to without pushes"));
}

TEST(Tenants, KeepTheirPositionsInANewTable) {
  const auto before = Tenants::Parse(R"({"tenants": [{"name": "a"}, {"name": "b"}]})");
  const auto after = Tenants::Parse(R"({"unknown": "refuse", "tenants": [
      {"name": "c", "weight": 3}, {"name": "b", "weight": 2}]})");
  ASSERT_TRUE(before.ok() && after.ok());
  const auto moved = after->InPositionsOf(*before);
  ASSERT_TRUE(moved.ok()) << moved.status();
  ASSERT_EQ(moved->all().size(), 4);
  EXPECT_TRUE(moved->all()[0].is_gone);
  EXPECT_EQ(moved->ByName("a"), std::nullopt);
  EXPECT_EQ(moved->ByName("b"), 1);
  EXPECT_EQ(moved->all()[1].weight, 2);
  EXPECT_TRUE(moved->all()[2].is_gone) << "the default tenant";
  EXPECT_EQ(moved->ByName("c"), 3);
  EXPECT_EQ(moved->all()[3].weight, 3);

  const auto again = before->InPositionsOf(*moved);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->all().size(), 4);
  EXPECT_EQ(again->ByName("a"), 0);
  EXPECT_FALSE(again->all()[0].is_gone);
  EXPECT_EQ(again->ByName("anyone"), 2);
}

TEST(Tenants, MayNotBeReplacedWithoutEnd) {
  Tenants tenants;
  absl::Status status;
  for (int file = 0; status.ok() && file < 10; ++file) {
    std::string json = R"({"unknown": "refuse", "tenants": [)";
    for (int i = 0; i < 256; ++i) {
      absl::StrAppend(&json, i == 0 ? "" : ", ", R"({"name": ")", file, "-", i, R"("})");
    }
    const auto next = Tenants::Parse(json + "]}");
    ASSERT_TRUE(next.ok()) << next.status();
    auto moved = next->InPositionsOf(tenants);
    status = moved.status();
    if (moved.ok()) tenants = *std::move(moved);
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("at most 1024"));
}

constexpr absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);

TEST(CheckTenantUse, BoundsTheRequestsUnderWay) {
  const Tenant tenant = {.name = "search", .max_requests = 3};
  EXPECT_TRUE(CheckTenantUse(tenant, {.requests = 2}, 10).ok());
  EXPECT_EQ(Plain(CheckTenantUse(tenant, {.requests = 3}, 10)),
            absl::ResourceExhaustedError(
                "tenant search: 3 requests are under way; at most 3 (max_requests)"));
}

TEST(CheckTenantUse, CountsARequestOnceForEachReceiver) {
  Tenant tenant;
  tenant.name = "a";
  tenant.max_requests = 3;
  EXPECT_TRUE(CheckTenantUse(tenant, {.requests = 1}, 10, /*num_requests=*/2).ok());
  EXPECT_EQ(
      Plain(CheckTenantUse(tenant, {.requests = 2}, 10, /*num_requests=*/2)),
      absl::ResourceExhaustedError("tenant a: 2 requests are under way and one of 2 receivers "
                                   "came; at most 3 (max_requests)"));
}

TEST(CheckTenantUse, BoundsTheTokensThatWaitButForTheFirst) {
  const Tenant tenant = {.name = "search", .max_queued_tokens = 1000};
  EXPECT_TRUE(CheckTenantUse(tenant, {}, 5000).ok());
  EXPECT_TRUE(CheckTenantUse(tenant, {.queued_tokens = 900}, 100).ok());
  EXPECT_EQ(Plain(CheckTenantUse(tenant, {.queued_tokens = 900}, 101)),
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

TEST(TokenBucket, KeepsADebtWhenItsRateChanges) {
  TokenBucket bucket(100);
  bucket.Take(1000, kNow);
  bucket.SetRate(50, kNow);
  EXPECT_EQ(bucket.WaitFor(100, kNow), absl::Seconds(2));
  bucket.SetRate(0, kNow);
  EXPECT_EQ(bucket.WaitFor(100, kNow), absl::ZeroDuration());
  bucket.Take(1 << 20, kNow);
  bucket.SetRate(100, kNow);
  EXPECT_EQ(bucket.WaitFor(1000, kNow), absl::ZeroDuration()) << "nothing was owed without a limit";
}

TEST(TokenBucket, OfRateZeroSetsNoLimit) {
  TokenBucket bucket(0);
  bucket.Take(1 << 20, kNow);
  EXPECT_EQ(bucket.WaitFor(1 << 20, kNow), absl::ZeroDuration());
}

TEST(CheckTenantRate, NamesTenantValueAndLimit) {
  TokenBucket bucket(100);
  bucket.Take(1000, kNow);
  EXPECT_EQ(Plain(CheckTenantRate({.name = "search", .tokens_per_second = 100}, bucket, 150, kNow)),
            absl::ResourceExhaustedError("tenant search: 150 tokens came 1.5s too soon; at most "
                                         "100 a second (tokens_per_second)"));
}

}  // namespace

}  // namespace prefilld::server
