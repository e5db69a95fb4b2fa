#include "server/first_token_metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class FirstToken : public ::testing::Test {
 protected:
  std::string Page() const { return prometheus::TextSerializer().Serialize(registry_.Collect()); }

  // Returns the series that count requests, with their labels.
  int NumSeries() const {
    int count = 0;
    for (const auto line : absl::StrSplit(Page(), '\n')) {
      count += absl::StartsWith(line, "prefilld_time_to_first_token_seconds_count{") ? 1 : 0;
    }
    return count;
  }

  prometheus::Registry registry_;
  FirstTokenMetrics metrics_{registry_, {0.1, 1}};
};

TEST_F(FirstToken, LengthsFallIntoSixClasses) {
  EXPECT_STREQ(LengthClass(0), "0-1k");
  EXPECT_STREQ(LengthClass(1024), "0-1k");
  EXPECT_STREQ(LengthClass(1025), "1k-4k");
  EXPECT_STREQ(LengthClass(4096), "1k-4k");
  EXPECT_STREQ(LengthClass(16384), "4k-16k");
  EXPECT_STREQ(LengthClass(65536), "16k-64k");
  EXPECT_STREQ(LengthClass(262144), "64k-256k");
  EXPECT_STREQ(LengthClass(262145), "256k-");
  EXPECT_STREQ(LengthClass(int64_t{1} << 40), "256k-");
}

TEST_F(FirstToken, EveryPolicyAndLengthIsThereFromTheStart) {
  EXPECT_EQ(NumSeries(), 3 * 6);
  EXPECT_THAT(Page(), Not(HasSubstr("policy=\"auto\"")));
  for (int64_t tokens = 1; tokens < 1 << 24; tokens *= 2) {
    metrics_.Observe(model::AttentionPolicy::kShare, tokens, absl::Seconds(1));
    metrics_.Observe(model::AttentionPolicy::kBaselineRandom, tokens, absl::Seconds(1));
  }
  EXPECT_EQ(NumSeries(), 4 * 6) << "more come only for policies that are no default";
}

TEST_F(FirstToken, IsCountedForItsPolicyAndLength) {
  metrics_.Observe(model::AttentionPolicy::kShare, 5000, absl::Milliseconds(500));
  const std::string page = Page();
  const std::string labels = "length=\"4k-16k\",policy=\"share\"";
  EXPECT_THAT(page, HasSubstr(absl::StrCat("_bucket{", labels, ",le=\"0.1\"} 0\n")));
  EXPECT_THAT(page, HasSubstr(absl::StrCat("_bucket{", labels, ",le=\"1\"} 1\n")));
  EXPECT_THAT(page, HasSubstr(absl::StrCat("_sum{", labels, "} 0.5\n")));
  EXPECT_THAT(page, HasSubstr("_count{length=\"4k-16k\",policy=\"dense\"} 0\n"));
}

}  // namespace
}  // namespace prefilld::server
