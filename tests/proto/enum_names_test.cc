#include "proto/wire/enum_names.h"

#include <gtest/gtest.h>

#include "prefill/v1/kv.pb.h"
#include "prefill/v1/prefill.pb.h"

namespace prefilld::wire {
namespace {

namespace v1 = ::prefill::v1;

TEST(EnumNames, AreThoseOfTheContractWithoutPrefixAndInSmallLetters) {
  EXPECT_EQ(EnumName(v1::ATTENTION_POLICY_VERTICAL_SLASH), "vertical_slash");
  EXPECT_EQ(EnumName(v1::DTYPE_BF16), "bf16");
  EXPECT_EQ(EnumNames<v1::DType>(), "bf16, fp16, fp32, fp8_e4m3");
}

TEST(EnumNames, AreReadBack) {
  const auto& type = *v1::AttentionPolicy_descriptor();
  for (int i = 1; i < type.value_count(); ++i) {
    const auto policy = static_cast<v1::AttentionPolicy>(type.value(i)->number());
    EXPECT_EQ(EnumFromName<v1::AttentionPolicy>(EnumName(policy)), policy);
  }
  EXPECT_EQ(EnumFromName<v1::DType>("BF16"), std::nullopt);
  EXPECT_EQ(EnumFromName<v1::DType>("fp8"), std::nullopt);
}

TEST(EnumNames, TheUnspecifiedValueAndUnknownOnesHaveNone) {
  EXPECT_EQ(EnumName(v1::DTYPE_UNSPECIFIED), "unknown");
  EXPECT_EQ(EnumName(static_cast<v1::DType>(77)), "unknown");
  EXPECT_EQ(EnumFromName<v1::DType>("unspecified"), std::nullopt);
  EXPECT_EQ(EnumFromName<v1::DType>("unknown"), std::nullopt);
}

}  // namespace
}  // namespace prefilld::wire
