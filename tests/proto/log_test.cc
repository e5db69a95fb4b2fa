#include "proto/process/log.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace prefilld::process {
namespace {

TEST(Log, TextIsKeyValue) {
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", "a"}, {"n", int64_t{3}}, {"ms", 1.5}}),
            "request id=a n=3 ms=1.5");
}

TEST(Log, ValuesCannotForgeFieldsOrLines) {
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", "a outcome=ok"}}),
            "request id=\"a outcome=ok\"");
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", "\"\n"}}), "request id=\"\\\"\\x0a\"");
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", ""}}), "request id=\"\"");
}

TEST(Log, JsonIsTheInsideOfOneObject) {
  const std::string line = FormatEvent(
      LogFormat::kJson, "request", {{"id", "say \"hi\"\n\xff"}, {"n", int64_t{3}}, {"ms", 1.5}});
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const auto object = nlohmann::json::parse("{" + line + "}");
  EXPECT_EQ(object["event"], "request");
  EXPECT_EQ(object["n"], 3);
  EXPECT_EQ(object["ms"], 1.5);
}

}  // namespace
}  // namespace prefilld::process
