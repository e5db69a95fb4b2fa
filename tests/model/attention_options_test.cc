#include "model/sparse/attention_options.h"

#include <algorithm>
#include <limits>
#include <set>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace prefilld::model {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

template <typename Members>
std::vector<typename Members::Value> OutsideOf(const Members& members) {
  using T = typename Members::Value;
  std::vector<T> values = {static_cast<T>(members.lowest - 1)};
  if (!members.lowest_allowed) values.push_back(members.lowest);
  if (members.highest < std::numeric_limits<T>::max()) values.push_back(members.highest + 1);
  return values;
}

TEST(ValidateAttention, DefaultsAreValid) { EXPECT_TRUE(Validate(AttentionOptions()).ok()); }

TEST(ValidateAttention, EveryThresholdHasItsRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (float AttentionOptions::*field :
       {&AttentionOptions::gamma, &AttentionOptions::tau, &AttentionOptions::delta,
        &AttentionOptions::coverage, &AttentionOptions::density}) {
    for (float value : {-0.01f, 1.01f, nan, std::numeric_limits<float>::infinity()}) {
      AttentionOptions options;
      options.*field = value;
      EXPECT_EQ(Validate(options).code(), absl::StatusCode::kInvalidArgument) << value;
    }
    AttentionOptions options;
    options.*field = 1.0f;
    EXPECT_TRUE(Validate(options).ok());
    options.*field = 0.0f;
    EXPECT_EQ(Validate(options).ok(),
              field != &AttentionOptions::gamma && field != &AttentionOptions::density)
        << "a pattern without mass or without blocks is no pattern";
  }
}

TEST(ValidateAttention, MessagesNameFieldValueAndRange) {
  AttentionOptions options;
  options.tau = 2.0f;
  EXPECT_THAT(Validate(options).message(), HasSubstr("attention.tau 2 is outside [0, 1]"));
  options = {};
  options.vertical_slash_gamma = 0.0f;
  EXPECT_THAT(Validate(options).message(),
              HasSubstr("attention.vertical_slash_gamma 0 is outside (0, 1]"));
  options = {};
  options.min_budget_tokens = -1;
  EXPECT_THAT(Validate(options).message(), HasSubstr("attention.min_budget_tokens -1"));
  options = {};
  options.recall_audit_rows = -1;
  EXPECT_THAT(Validate(options).message(), HasSubstr("attention.recall_audit_rows -1"));
  options = {};
  options.policy = static_cast<AttentionPolicy>(9);
  EXPECT_THAT(Validate(options).message(), HasSubstr("attention.policy 9"));
}

TEST(AttentionPolicyNames, SayWhichAreBaselines) {
  for (const AttentionPolicyInfo& info : kAttentionPolicies) {
    EXPECT_EQ(IsBaseline(info.policy), std::string(info.name).rfind("baseline_", 0) == 0)
        << info.name;
  }
}

TEST(AttentionPolicyNames, AreReadAsTheyAreWritten) {
  for (const AttentionPolicyInfo& info : kAttentionPolicies) {
    EXPECT_EQ(ParsePolicy(Name(info.policy)), info.policy) << info.name;
  }
  EXPECT_EQ(ParsePolicy("vertical_slash"), AttentionPolicy::kVerticalSlash);
  EXPECT_EQ(ParsePolicy("baseline_random"), AttentionPolicy::kBaselineRandom);
  EXPECT_EQ(ParsePolicy("Dense"), std::nullopt);
  EXPECT_EQ(ParsePolicy(""), std::nullopt);
}

TEST(AttentionPolicyNames, BaselinesAreNotForServing) {
  const std::vector<AttentionPolicy> serving = PoliciesForServing();
  EXPECT_THAT(PolicyNames(serving), StartsWith("dense, vertical_slash, share, auto"));
  for (const AttentionPolicyInfo& info : kAttentionPolicies) {
    const bool serves = std::find(serving.begin(), serving.end(), info.policy) != serving.end();
    EXPECT_EQ(serves, !info.is_baseline) << info.name;
  }
}

// Each row is tested by itself, so that a row with a member of another row fails.
TEST(AttentionThresholds, EveryRowNamesItsOwnMembersAndItsLimits) {
  std::set<std::string> names;
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    SCOPED_TRACE(threshold.name);
    EXPECT_TRUE(names.insert(threshold.name).second) << "twice";
    EXPECT_NE(threshold.setters, 0u);
    std::visit(
        [&](const auto& members) {
          using T = typename std::decay_t<decltype(members)>::Value;
          AttentionOverrides overrides;
          if constexpr (std::is_same_v<T, bool>) {
            overrides.*members.named = !std::get<bool>(ValueOf(threshold, AttentionOptions()));
          } else {
            for (const T value : OutsideOf(members)) {
              overrides.*members.named = value;
              const absl::Status status = Validate(Apply(overrides, AttentionOptions()));
              EXPECT_EQ(status.message(), absl::StrCat("attention.", threshold.name, " ", value,
                                                       " is outside ", members.LimitsText()));
            }
            overrides.*members.named = members.Contains(1) ? static_cast<T>(1) : members.highest;
          }
          const AttentionOptions options = Apply(overrides, AttentionOptions());
          EXPECT_TRUE(Validate(options).ok());
          for (const AttentionThreshold& other : kAttentionThresholds) {
            // vertical_slash_gamma follows gamma.
            const bool follows = std::string(threshold.name) == "gamma" &&
                                 std::string(other.name) == "vertical_slash_gamma";
            const bool changed = ValueOf(other, options) != ValueOf(other, AttentionOptions());
            const bool keeps = threshold.name == std::string("delta");  // 1 is built in
            EXPECT_EQ(changed, (other.name == threshold.name && !keeps) || follows) << other.name;
          }
        },
        threshold.members);
  }
}

TEST(AttentionThresholds, HelpSaysLimitsAndTheBuiltInValue) {
  EXPECT_THAT(ThresholdHelp(ThresholdNamed("tau")), HasSubstr(" In [0, 1]. Built in: 0.4."));
  EXPECT_THAT(ThresholdHelp(ThresholdNamed("vertical_slash_gamma")),
              HasSubstr(" In (0, 1]. Built in: 0.9."));
  EXPECT_THAT(ThresholdHelp(ThresholdNamed("min_budget_tokens")),
              HasSubstr(" In [0, inf). Built in: 128."));
  EXPECT_THAT(ThresholdHelp(ThresholdNamed("same_layer_sharing")),
              HasSubstr("layer. Built in: true."));
}

TEST(AttentionOptions, ScoresHaveAStrideOf8Or16) {
  AttentionOptions options;
  options.score_stride = 16;
  EXPECT_TRUE(Validate(options).ok());
  options.score_stride = 12;
  EXPECT_EQ(Validate(options).message(), "attention.score_stride 12 is none of 8, 16");
}

TEST(ApplyOverrides, ReplacesWhatWasSaidAndNothingElse) {
  AttentionOverrides overrides;
  overrides.tau = 0.1f;
  overrides.same_layer_sharing = false;
  const AttentionOptions options = Apply(overrides, AttentionOptions());
  EXPECT_EQ(options.tau, 0.1f);
  EXPECT_FALSE(options.same_layer_sharing);
  EXPECT_EQ(options.gamma, AttentionOptions().gamma);
}

TEST(ApplyOverrides, GammaAloneIsThatOfVerticalSlashToo) {
  AttentionOptions tuned;
  tuned.gamma = 0.8f;
  tuned.vertical_slash_gamma = 0.5f;
  AttentionOverrides overrides;
  overrides.tau = 0.1f;
  EXPECT_EQ(Apply(overrides, tuned).vertical_slash_gamma, 0.5f);
  overrides.vertical_slash_gamma = 0.6f;
  EXPECT_EQ(Apply(overrides, tuned).vertical_slash_gamma, 0.6f);
  overrides.gamma = 0.9f;
  EXPECT_EQ(Apply(overrides, tuned).vertical_slash_gamma, 0.6f) << "both named";
  overrides.vertical_slash_gamma.reset();
  EXPECT_EQ(Apply(overrides, tuned).gamma, 0.9f);
  EXPECT_EQ(Apply(overrides, tuned).vertical_slash_gamma, std::nullopt);
}

TEST(AttentionOptions, VerticalSlashHasItsOwnGammaOrTheCommonOne) {
  AttentionOptions options;
  options.gamma = 0.8f;
  EXPECT_EQ(options.gamma_of_vertical_slash(), 0.8f);
  options.vertical_slash_gamma = 0.5f;
  EXPECT_EQ(options.gamma_of_vertical_slash(), 0.5f);
}

TEST(ResolvePolicy, AutoSharesFromTheCrossoverOn) {
  AttentionOptions options;
  options.crossover_tokens = 1000;
  EXPECT_EQ(ResolvePolicy(options, 999, 64), AttentionPolicy::kDense);
  EXPECT_EQ(ResolvePolicy(options, 1000, 64), AttentionPolicy::kShare);
}

TEST(ResolvePolicy, TwoBlocksAreDenseUnderEveryPolicy) {
  AttentionOptions options;
  options.policy = AttentionPolicy::kVerticalSlash;
  EXPECT_EQ(ResolvePolicy(options, 128, 64), AttentionPolicy::kDense);
  EXPECT_EQ(ResolvePolicy(options, 129, 64), AttentionPolicy::kVerticalSlash);
}

}  // namespace
}  // namespace prefilld::model
