#include "proto/process/problems.h"

#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace prefilld::process {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(Problems, NameFlagValueAndRange) {
  Problems problems;
  CheckRange("--lanes", 17, 1, 16, problems);
  CheckSeconds("--stall_timeout_s", absl::Seconds(0), 3600, problems);
  CheckSeconds("--drain_timeout_s", absl::Seconds(std::numeric_limits<double>::quiet_NaN()), 10,
               problems);
  AddIfAny("--listen=x is not host:port", problems);
  AddIfAny(std::nullopt, problems);
  EXPECT_THAT(
      problems,
      ElementsAre("--lanes=17 is outside 1 to 16", "--stall_timeout_s=0 is outside (0, 3600]",
                  "--drain_timeout_s=inf is outside (0, 10]", "--listen=x is not host:port"));
}

TEST(Problems, TheLimitsThemselvesAreAllowed) {
  Problems problems;
  CheckRange("--lanes", 1, 1, 16, problems);
  CheckRange("--lanes", 16, 1, 16, problems);
  CheckSeconds("--drain_timeout_s", absl::Seconds(3600), 3600, problems);
  EXPECT_THAT(problems, IsEmpty());
}

TEST(Problems, AreOneStatus) {
  EXPECT_TRUE(ToStatus({}).ok());
  EXPECT_EQ(ToStatus({"one", "two"}), absl::InvalidArgumentError("one; two"));
}

}  // namespace
}  // namespace prefilld::process
