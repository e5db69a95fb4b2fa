// Tests that every row of the tables of thresholds and policies has its flag and its field of the
// contract, and that each of these entrances refuses what is out of range.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/strings/str_cat.h"
#include "model/sparse/attention_options.h"
#include "proto/wire/enum_names.h"
#include "server/attention_request.h"
#include "server/options.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;
using google::protobuf::FieldDescriptor;
using model::AttentionThreshold;
using model::kAttentionThresholds;
using ::testing::HasSubstr;

// Returns the options of a prefilld that is started with this flag. The flags are restored on
// return.
absl::StatusOr<ServerOptions> Start(const std::string& flag) {
  const absl::FlagSaver saver;
  std::string program = "prefilld", model = "--model=/somewhere", argument = "--" + flag;
  std::vector<char*> arguments = {program.data(), model.data(), argument.data()};
  return OptionsFromFlags(
      absl::ParseCommandLine(static_cast<int>(arguments.size()), arguments.data()));
}

const FieldDescriptor* FieldOf(const char* name) {
  return v1::AttentionOptions::descriptor()->FindFieldByName(name);
}

void Set(const char* name, double value, v1::AttentionOptions& request) {
  const auto& reflection = *request.GetReflection();
  const FieldDescriptor* field = FieldOf(name);
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_FLOAT:
      return reflection.SetFloat(&request, field, static_cast<float>(value));
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection.SetUInt32(&request, field, static_cast<uint32_t>(value));
    default:
      return reflection.SetBool(&request, field, value != 0);
  }
}

constexpr int64_t kTokens = 1000;

AttentionLimits Limits() {
  return {.defaults = {},
          .beyond_calibration = {},
          .allowed_policies = model::PoliciesForServing(),
          .recall_audit = {.fraction = 0.0, .rows = 8}};
}

template <typename Members>
constexpr bool kIsFloat = std::is_same_v<typename Members::Value, float>;
template <typename Members>
constexpr bool kIsBool = std::is_same_v<typename Members::Value, bool>;

TEST(AttentionThresholdsOfARequest, AreFieldsOfTheContractAndTheOtherWayRound) {
  int known = 1;  // policy
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    const FieldDescriptor* field = FieldOf(threshold.name);
    const bool may = (threshold.setters & model::kRequest) != 0;
    ASSERT_EQ(field != nullptr, may) << threshold.name;
    if (!may) continue;
    ++known;
    EXPECT_TRUE(field->has_presence()) << threshold.name << ": absent must differ from 0";
    std::visit(
        [&](const auto& members) {
          using Members = std::decay_t<decltype(members)>;
          EXPECT_EQ(field->cpp_type(), kIsFloat<Members>  ? FieldDescriptor::CPPTYPE_FLOAT
                                       : kIsBool<Members> ? FieldDescriptor::CPPTYPE_BOOL
                                                          : FieldDescriptor::CPPTYPE_UINT32)
              << threshold.name;
        },
        threshold.members);
  }
  EXPECT_EQ(v1::AttentionOptions::descriptor()->field_count(), known)
      << "a field of prefill.v1.AttentionOptions has no row in kAttentionThresholds";
}

TEST(AttentionThresholdsOfARequest, OverrideTheServersAndAreRefusedOutOfRange) {
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    if ((threshold.setters & model::kRequest) == 0) continue;
    SCOPED_TRACE(threshold.name);
    std::visit(
        [&](const auto& members) {
          using Members = std::decay_t<decltype(members)>;
          using T = typename Members::Value;
          T value = kIsFloat<Members> ? T(0.25) : kIsBool<Members> ? T(false) : T(7);
          if (!members.Contains(value)) value = members.highest;
          v1::AttentionOptions request;
          Set(threshold.name, static_cast<double>(value), request);
          const auto options = ResolveAttention(request, kTokens, Limits());
          ASSERT_TRUE(options.ok()) << options.status();
          EXPECT_EQ((*options).*members.option, value);

          if constexpr (kIsFloat<Members>) {
            for (const T outside :
                 {members.lowest - 1, members.highest + 1, std::numeric_limits<T>::quiet_NaN()}) {
              Set(threshold.name, outside, request);
              const absl::Status refused = ResolveAttention(request, kTokens, Limits()).status();
              EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
              EXPECT_EQ(refused.message(), absl::StrCat("attention.", threshold.name, " ", outside,
                                                        " is outside ", members.LimitsText()));
            }
          }
        },
        threshold.members);
  }
}

TEST(AttentionThresholdsOfAClusterFile, DoNotCountForPromptsBeyondItsPromise) {
  AttentionLimits limits = Limits();
  limits.defaults.score_threshold = 0.8f;
  limits.beyond_calibration.coverage = 0.0f;
  limits.calibrated_tokens = kTokens;
  v1::AttentionOptions request;
  request.set_tau(0.3f);
  const auto within = ResolveAttention(request, kTokens, limits);
  const auto beyond = ResolveAttention(request, kTokens + 1, limits);
  ASSERT_TRUE(within.ok() && beyond.ok());
  EXPECT_EQ(within->score_threshold, 0.8f);
  EXPECT_EQ(within->coverage, model::AttentionOptions().coverage);
  EXPECT_EQ(beyond->score_threshold, model::AttentionOptions().score_threshold);
  EXPECT_EQ(beyond->coverage, 0.0f);
  EXPECT_EQ(beyond->tau, 0.3f) << "what the request names counts for any length";
}

TEST(AttentionThresholdsOfAnOperator, AreFlagsAndAreRefusedOutOfRange) {
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    if ((threshold.setters & model::kOperator) == 0) continue;
    SCOPED_TRACE(threshold.name);
    const absl::CommandLineFlag* flag = absl::FindCommandLineFlag(threshold.name);
    ASSERT_NE(flag, nullptr) << "no flag in server/options.cc";
    EXPECT_EQ(flag->Help(), model::ThresholdHelp(threshold));
    std::visit(
        [&](const auto& members) {
          const int value = members.Contains(1) ? 1 : static_cast<int>(members.highest);
          const auto options = Start(absl::StrCat(threshold.name, "=", value));
          ASSERT_TRUE(options.ok()) << options.status();
          EXPECT_EQ(options->attention.*members.named, value)
              << "the flag's type is not the table's";

          const auto refused = Start(absl::StrCat(threshold.name, "=-1"));
          EXPECT_THAT(std::string(refused.status().message()),
                      HasSubstr(absl::StrCat("attention.", threshold.name, " -1 is outside ",
                                             members.LimitsText())));
        },
        threshold.members);
  }
}

TEST(AttentionThresholdsOfAnOperator, AreLeftAloneWithoutFlags) {
  const auto options = Start("queue_capacity=5");
  ASSERT_TRUE(options.ok()) << options.status();
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    std::visit(
        [&](const auto& members) {
          EXPECT_FALSE((options->attention.*members.named).has_value()) << threshold.name;
        },
        threshold.members);
  }
}

TEST(AttentionPolicies, HaveTheNamesOfTheContract) {
  const auto& values = *v1::AttentionPolicy_descriptor();
  EXPECT_EQ(values.value_count(), 1 + static_cast<int>(std::size(model::kAttentionPolicies)));
  for (const model::AttentionPolicyInfo& info : model::kAttentionPolicies) {
    EXPECT_NE(ToProto(info.policy), v1::ATTENTION_POLICY_UNSPECIFIED) << info.name;
    EXPECT_EQ(wire::EnumName(ToProto(info.policy)), info.name);
    v1::AttentionOptions request;
    request.set_policy(ToProto(info.policy));
    AttentionLimits limits = Limits();
    EXPECT_EQ(ResolveAttention(request, kTokens, limits).ok(), !info.is_baseline) << info.name;
    limits.allowed_policies = {info.policy};
    const auto options = ResolveAttention(request, kTokens, limits);
    ASSERT_TRUE(options.ok()) << options.status();
    EXPECT_EQ(options->policy, info.policy);
  }
}

TEST(AttentionPolicies, AreFlagsByTheirNames) {
  for (const model::AttentionPolicyInfo& info : model::kAttentionPolicies) {
    const auto allowed = Start(absl::StrCat("allowed_policies=", info.name));
    ASSERT_TRUE(allowed.ok()) << allowed.status();
    EXPECT_THAT(allowed->allowed_policies, ::testing::ElementsAre(info.policy));
    EXPECT_EQ(allowed->engine.baselines, info.is_baseline);
    EXPECT_THAT(absl::FindCommandLineFlag("allowed_policies")->Help(), HasSubstr(info.name));
  }
  EXPECT_EQ(Start("policy=share")->attention.policy, model::AttentionPolicy::kShare);
  EXPECT_THAT(std::string(Start("policy=fast").status().message()),
              HasSubstr("--policy=fast is not one of dense, "));
}

}  // namespace
}  // namespace prefilld::server
