// Tests what prefill-cli's flags become in a request.
#include "client/cli/options.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/strings/str_cat.h"
#include "proto/wire/enum_names.h"

namespace prefilld::client {
namespace {

namespace v1 = ::prefill::v1;
using google::protobuf::FieldDescriptor;
using ::testing::HasSubstr;

// The options of a prefill-cli that is called with this flag. Flags are as before when this
// returns.
absl::StatusOr<CliOptions> Call(const std::string& flag) {
  const absl::FlagSaver saver;
  std::string program = "prefill-cli", command = "info", argument = "--" + flag;
  std::vector<char*> arguments = {program.data(), command.data(), argument.data()};
  return OptionsFromFlags(
      absl::ParseCommandLine(static_cast<int>(arguments.size()), arguments.data()));
}

TEST(CliOptions, EveryFieldOfAttentionOptionsHasAFlag) {
  const auto& fields = *v1::AttentionOptions::descriptor();
  for (int i = 0; i < fields.field_count(); ++i) {
    const FieldDescriptor* field = fields.field(i);
    SCOPED_TRACE(field->name());
    const bool is_policy = field->cpp_type() == FieldDescriptor::CPPTYPE_ENUM;
    const auto options = Call(absl::StrCat(field->name(), "=", is_policy ? "share" : "1"));
    ASSERT_NE(absl::FindCommandLineFlag(field->name()), nullptr) << "in client/cli/options.cc";
    ASSERT_TRUE(options.ok()) << options.status();
    std::vector<const FieldDescriptor*> set;
    options->attention.GetReflection()->ListFields(options->attention, &set);
    EXPECT_THAT(set, ::testing::ElementsAre(field)) << "the flag's type is not the field's";
  }
}

TEST(CliOptions, FieldsOfFlagsThatAreNotGivenAreAbsent) {
  const auto options = Call("quiet");
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->attention.ByteSizeLong(), 0u);
}

TEST(CliOptions, ValuesReachTheRequest) {
  EXPECT_EQ(Call("gamma=0.75")->attention.gamma(), 0.75f);
  EXPECT_EQ(Call("min_budget_tokens=64")->attention.min_budget_tokens(), 64u);
  const auto options = Call("same_layer_sharing=false");
  EXPECT_TRUE(options->attention.has_same_layer_sharing());
  EXPECT_FALSE(options->attention.same_layer_sharing());
  EXPECT_EQ(Call("kv_dtype=fp16")->layout.dtype(), v1::DTYPE_FP16);
  EXPECT_EQ(Call("kv_dtype=fp8_e4m3")->layout.dtype(), v1::DTYPE_FP8_E4M3);
  EXPECT_EQ(Call("kv_scales=per_block")->layout.scales(), v1::KV_SCALES_PER_BLOCK);
}

TEST(CliOptions, LanesAreChosenUnlessTheyAreNamed) {
  EXPECT_EQ(Call("quiet")->lanes, 0u);
  EXPECT_EQ(Call("lanes=auto")->lanes, 0u);
  EXPECT_EQ(Call("lanes=8")->lanes, 8u);
  EXPECT_EQ(Call("quiet")->kv_bench.lanes, (std::vector<uint32_t>{1, 4, 8}));
  EXPECT_EQ(Call("lanes=8")->kv_bench.lanes, std::vector<uint32_t>{8});
}

TEST(CliOptions, MetadataIsKeysAndValues) {
  EXPECT_EQ(Call("metadata=x-tenant=search,x-b=c=d")->metadata,
            (Metadata{{"x-tenant", "search"}, {"x-b", "c=d"}}));
  EXPECT_THAT(std::string(Call("metadata=search").status().message()),
              HasSubstr("--metadata: 'search' is not key=value"));
  EXPECT_EQ(Call("token_file=/some/file")->channel.token_file, "/some/file");
  EXPECT_EQ(Call("priority=-3")->priority, -3);
}

TEST(CliOptions, PoliciesGoByTheNamesOfTheContract) {
  const auto& values = *v1::AttentionPolicy_descriptor();
  const std::string help = absl::FindCommandLineFlag("policy")->Help();
  for (int i = 1; i < values.value_count(); ++i) {
    const std::string name = wire::EnumName(values, values.value(i)->number());
    EXPECT_EQ(Call(absl::StrCat("policy=", name))->attention.policy(), values.value(i)->number());
    EXPECT_THAT(help, HasSubstr(name));
  }
  EXPECT_EQ(Call("policy=")->attention.policy(), v1::ATTENTION_POLICY_UNSPECIFIED);
  EXPECT_THAT(std::string(Call("policy=fast").status().message()),
              HasSubstr(absl::StrCat("--policy=fast is not one of ", wire::EnumNames(values))));
  EXPECT_FALSE(Call("policy=unspecified").ok());
}

TEST(CliOptions, TheLoadOfBenchHasLimits) {
  const auto problem = [](const std::string& flag) {
    return std::string(Call(flag).status().message());
  };
  EXPECT_EQ(Call("max_in_flight=7")->bench.max_in_flight, 7);
  EXPECT_THAT(problem("max_in_flight=0"), HasSubstr("--max_in_flight"));
  EXPECT_THAT(problem("rate=-1"), HasSubstr("--rate is outside 0 to 100000"));
  EXPECT_THAT(problem("speedup=0"), HasSubstr("--speedup must be above 0"));
  EXPECT_THAT(problem("num_requests=1000001"), HasSubstr("--num_requests"));
  EXPECT_THAT(problem("last_blocks=-2"), HasSubstr("--last_blocks"));
  EXPECT_THAT(problem("prompt_tokens=0"), HasSubstr("--prompt_tokens"));
}

}  // namespace
}  // namespace prefilld::client
