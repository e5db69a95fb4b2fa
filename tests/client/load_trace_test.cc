// Tests what the load generator sends, and what it makes of the times.
#include "client/cli/load_trace.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/cli/load_report.h"
#include "nlohmann/json.hpp"

namespace prefilld::client {
namespace {

using ::testing::HasSubstr;

std::string ProblemOf(const std::string& csv) {
  return std::string(ParseTrace(csv).status().message());
}

TEST(ParseTrace, ReadsColumnsInAnyOrder) {
  const auto requests = ParseTrace(
      "# made up\n"
      "tokens, arrival_s, priority, tenant, prefix_tokens, prefix\r\n"
      "\n"
      "300,0.5,-2,reports,128,manual\n"
      "7,1.25,,,,\n");
  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 2);
  EXPECT_EQ((*requests)[0].arrival, absl::Milliseconds(500));
  EXPECT_EQ((*requests)[0].num_tokens, 300);
  EXPECT_EQ((*requests)[0].priority, -2);
  EXPECT_EQ((*requests)[0].tenant, "reports");
  EXPECT_EQ((*requests)[0].prefix, "manual");
  EXPECT_EQ((*requests)[0].prefix_tokens, 128);
  EXPECT_EQ((*requests)[1].tenant, "");
  EXPECT_EQ((*requests)[1].prefix_tokens, 0);
}

TEST(ParseTrace, RefusesWithLineFieldValueAndLimit) {
  EXPECT_EQ(ProblemOf(""), "there are no requests");
  EXPECT_EQ(ProblemOf("arrival_s,tokens\n"), "there are no requests");
  EXPECT_EQ(ProblemOf("arrival_s\n1\n"), "line 1: there is no column tokens");
  EXPECT_THAT(ProblemOf("arrival_s,tokens,size\n"),
              HasSubstr("line 1: column 'size' is not one of"));
  EXPECT_EQ(ProblemOf("tokens,arrival_s,tokens\n"), "line 1: column tokens is there twice");
  EXPECT_EQ(ProblemOf("arrival_s,tokens\n1\n"), "line 2: has 1 fields; the columns are 2");
  EXPECT_EQ(ProblemOf("arrival_s,tokens\n1,0\n"),
            "line 2: tokens '0' is no whole number from 1 to 16777216");
  EXPECT_EQ(ProblemOf("arrival_s,tokens\n1,2.5\n"),
            "line 2: tokens '2.5' is no whole number from 1 to 16777216");
  EXPECT_EQ(ProblemOf("arrival_s,tokens\n-1,5\n"),
            "line 2: arrival_s '-1' is no number from 0 to 10000000");
  EXPECT_EQ(ProblemOf("arrival_s,tokens\nnan,5\n"),
            "line 2: arrival_s 'nan' is no number from 0 to 10000000");
  EXPECT_EQ(ProblemOf("arrival_s,tokens\n2,5\n1,5\n"),
            "line 3: arrival_s 1 is before the one of the line above");
  EXPECT_EQ(ProblemOf("arrival_s,tokens,priority\n1,5,8\n"),
            "line 2: priority '8' is no whole number from -7 to 7");
  EXPECT_EQ(ProblemOf("arrival_s,tokens,prefix,prefix_tokens\n1,5,a,6\n"),
            "line 2: prefix_tokens '6' is no whole number from 0 to 5");
  EXPECT_EQ(ProblemOf("arrival_s,tokens,prefix,prefix_tokens\n1,5,a,\n"),
            "line 2: prefix and prefix_tokens belong together");
  EXPECT_THAT(ProblemOf("arrival_s,tokens\n\"1\",5\n"), HasSubstr("has a quotation mark"));
  EXPECT_EQ(ReadTrace("/no/such/file").status().message(), "cannot read /no/such/file");
}

TEST(PoissonLoad, ComesAtTheRateWithExponentialPausesAndTheShapesInTurn) {
  const std::vector<LoadRequest> shapes = {{.num_tokens = 10}, {.num_tokens = 20}};
  const auto requests = PoissonLoad(shapes, /*per_second=*/50, /*count=*/20'000, /*seed=*/3);
  ASSERT_EQ(requests.size(), 20'000);
  EXPECT_EQ(requests[0].num_tokens, 10);
  EXPECT_EQ(requests[3].num_tokens, 20);
  EXPECT_NEAR(absl::ToDoubleSeconds(requests.back().arrival), 400, 12);
  int long_pauses = 0;  // longer than the mean: a share of 1 / e
  for (size_t i = 1; i < requests.size(); ++i) {
    ASSERT_GE(requests[i].arrival, requests[i - 1].arrival);
    long_pauses += requests[i].arrival - requests[i - 1].arrival > absl::Milliseconds(20) ? 1 : 0;
  }
  EXPECT_NEAR(long_pauses / 20'000.0, std::exp(-1), 0.02);
  EXPECT_NE(PoissonLoad(shapes, 50, 1, 4)[0].arrival, requests[0].arrival) << "another seed";
}

TEST(ShapeLoad, CutsSpeedsUpAndReplacesArrivals) {
  const std::vector<LoadRequest> trace = {{.arrival = absl::Seconds(3), .num_tokens = 1},
                                          {.arrival = absl::Seconds(9), .num_tokens = 2}};
  EXPECT_EQ(ShapeLoad(trace, {}).size(), 2);
  EXPECT_EQ(ShapeLoad(trace, {.num_requests = 1}).size(), 1);
  EXPECT_EQ(ShapeLoad(trace, {.num_requests = 5}).size(), 2) << "no more than the trace has";
  EXPECT_EQ(ShapeLoad(trace, {.speedup = 1.5})[1].arrival, absl::Seconds(6));
  const auto again = ShapeLoad(trace, {.rate = 10, .speedup = 2, .num_requests = 5, .seed = 1});
  ASSERT_EQ(again.size(), 5);
  EXPECT_EQ(again[2].num_tokens, 1);
  EXPECT_EQ(again[4].arrival, PoissonLoad(trace, 10, 5, 1)[4].arrival / 2.0);
}

TEST(TokensOf, SharesThePrefixAndNothingElse) {
  const auto tokens = [](int64_t count, const std::string& prefix, int64_t shared, size_t index,
                         uint64_t seed = 1) {
    return TokensOf({.num_tokens = count, .prefix = prefix, .prefix_tokens = shared}, index, seed,
                    /*vocab_size=*/1000);
  };
  const auto a = tokens(500, "x", 300, 0), b = tokens(400, "x", 200, 1),
             c = tokens(500, "y", 300, 2);
  const auto common = [](const std::vector<uint32_t>& one, const std::vector<uint32_t>& other) {
    size_t count = 0;
    while (count < one.size() && count < other.size() && one[count] == other[count]) ++count;
    return count;
  };
  ASSERT_EQ(a.size(), 500);
  for (const uint32_t token : a) EXPECT_LT(token, 1000);
  EXPECT_GE(common(a, b), 200);
  EXPECT_LE(common(a, b), 203) << "the rest agrees by chance alone";
  EXPECT_LE(common(a, c), 3);
  EXPECT_EQ(a, tokens(500, "x", 300, 0)) << "again";
  EXPECT_LE(common(a, tokens(500, "x", 300, 0, /*seed=*/2)), 3);
}

TEST(Percentile, IsTheNearestRank) {
  const std::vector<double> values = {1, 2, 3, 4};
  EXPECT_EQ(Percentile(values, 0.5), 2);
  EXPECT_EQ(Percentile(values, 0.51), 3);
  EXPECT_EQ(Percentile(values, 0.99), 4);
  EXPECT_EQ(Percentile(values, 1.0), 4);
  EXPECT_EQ(Percentile(values, 0.0), 1);
  std::vector<double> hundred;
  for (int i = 1; i <= 100; ++i) hundred.push_back(i);
  EXPECT_EQ(Percentile(hundred, 0.99), 99);
}

TEST(LoadReport, CountsEndsByStatusAndTimesOfWhatCame) {
  LoadEnd fast;
  fast.request = {.arrival = absl::Seconds(0), .num_tokens = 1000, .tenant = "a", .priority = 1};
  fast.first_token = absl::Milliseconds(100);
  fast.last_block = absl::Milliseconds(120);
  fast.result = fast.ended = absl::Milliseconds(130);
  fast.cached_tokens = 128;
  LoadEnd slow = fast;
  slow.request = {.arrival = absl::Seconds(1), .num_tokens = 5000, .tenant = "b"};
  slow.first_token = absl::Milliseconds(900);
  slow.last_block = std::nullopt;
  slow.result = slow.ended = absl::Seconds(1);
  slow.late = absl::Milliseconds(3);
  LoadEnd refused;
  refused.request = {.arrival = absl::Seconds(2), .num_tokens = 2000, .tenant = "b"};
  refused.code = absl::StatusCode::kResourceExhausted;
  refused.ended = absl::Milliseconds(5);

  const auto report =
      LoadReport({fast, slow, refused}, {.max_in_flight = 8, .most_in_flight = 2, .held_back = 1});
  EXPECT_EQ(report["requests"], 3);
  EXPECT_EQ(report["ends"]["OK"], 2);
  EXPECT_EQ(report["ends"]["RESOURCE_EXHAUSTED"], 1);
  EXPECT_EQ(report["seconds"], 2.005);
  EXPECT_EQ(report["offered"]["requests_per_s"], 1.5);
  EXPECT_EQ(report["offered"]["tokens_per_s"], 4000);
  EXPECT_NEAR(report["done"]["tokens_per_s"].get<double>(), 6000 / 2.005, 0.01);
  EXPECT_EQ(report["first_token_ms"]["count"], 2);
  EXPECT_EQ(report["first_token_ms"]["mean"], 500);
  EXPECT_EQ(report["first_token_ms"]["p50"], 100);
  EXPECT_EQ(report["first_token_ms"]["p99"], 900);
  EXPECT_EQ(report["last_block_ms"]["count"], 1);
  EXPECT_EQ(report["cached_tokens"], 256);
  EXPECT_EQ(report["by_length"]["up to 1024"]["requests"], 1);
  EXPECT_EQ(report["by_length"]["up to 16384"]["first_token_ms"]["max"], 900);
  EXPECT_EQ(report["by_tenant"]["b"]["ends"]["RESOURCE_EXHAUSTED"], 1);
  EXPECT_EQ(report["by_priority"]["1"]["requests"], 1);
  EXPECT_EQ(report["sender"]["late_ms"]["max"], 3);
  EXPECT_EQ(report["sender"]["held_back"], 1);
  const std::string text = LoadSummary(report);
  EXPECT_THAT(text, HasSubstr("OK 2, RESOURCE_EXHAUSTED 1"));
  EXPECT_THAT(text, HasSubstr("at most 2 of 8 at a time; 1 held back"));
}

TEST(LoadReport, ListsEveryRequestIfAsked) {
  LoadEnd answered, refused;
  answered.request.num_tokens = 1000;
  answered.first_token = absl::Milliseconds(100);
  refused.request.num_tokens = 7;
  refused.code = absl::StatusCode::kResourceExhausted;
  EXPECT_EQ(EachRequest({answered, refused}).dump(),
            R"([{"first_token_ms":100.0,"tokens":1000},{"first_token_ms":null,"tokens":7}])");
}

TEST(LoadReport, SaysNothingOfTimesThatThereAreNot) {
  LoadEnd refused;
  refused.code = absl::StatusCode::kUnavailable;
  const auto report = LoadReport({refused}, {});
  EXPECT_EQ(report["first_token_ms"]["count"], 0);
  EXPECT_FALSE(report["first_token_ms"].contains("p99"));
  EXPECT_THAT(LoadSummary(report), HasSubstr("none"));
}

}  // namespace
}  // namespace prefilld::client
