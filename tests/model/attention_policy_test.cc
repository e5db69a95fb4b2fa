#include "model/sparse/attention_policy.h"

#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace prefilld::model {
namespace {

using ::testing::HasSubstr;

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
  for (const AttentionPolicy policy : kAttentionPolicies) {
    EXPECT_EQ(IsBaseline(policy), std::string(Name(policy)).rfind("baseline_", 0) == 0)
        << Name(policy);
  }
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

TEST(ResolvePolicy, AutoSharesFromTheCrossoverOnWhereThereAreClusters) {
  AttentionOptions options;
  options.crossover_tokens = 1000;
  EXPECT_EQ(ResolvePolicy(options, 999, 64, true), AttentionPolicy::kDense);
  EXPECT_EQ(ResolvePolicy(options, 1000, 64, true), AttentionPolicy::kShare);
  EXPECT_EQ(ResolvePolicy(options, 1000, 64, false), AttentionPolicy::kDense);
}

TEST(ResolvePolicy, TwoBlocksAreDenseUnderEveryPolicy) {
  AttentionOptions options;
  options.policy = AttentionPolicy::kVerticalSlash;
  EXPECT_EQ(ResolvePolicy(options, 128, 64, true), AttentionPolicy::kDense);
  EXPECT_EQ(ResolvePolicy(options, 129, 64, true), AttentionPolicy::kVerticalSlash);
}

}  // namespace
}  // namespace prefilld::model
