// Tests the command line of prefilld.
#include <string>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/proto/program_run.h"

namespace prefilld::server {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::pair<int, std::string> RunPrefilld(const std::string& flags) {
  return RunCommand(PREFILLD_BINARY " " + flags);
}

TEST(CommandLine, HelpListsEveryFlagWithItsDefault) { ExpectHelpListsEveryFlag(PREFILLD_BINARY); }

TEST(CommandLine, OpenMpThreadsThatWaitSleep) { ExpectOpenMpThreadsSleep(PREFILLD_BINARY); }

TEST(CommandLine, UnknownFlagsAreRefused) {
  const auto [status, output] = RunPrefilld("--model=/nowhere --stall_timeout_ms=3");
  EXPECT_EQ(status, 1);
  EXPECT_THAT(output, HasSubstr("stall_timeout_ms"));
}

TEST(CommandLine, EveryProblemIsListed) {
  const auto [status, output] = RunPrefilld(
      "leftover --device=tpu --policy=fast --allowed_policies=dense,none --log_format=xml "
      "--queue_capacity=-2 --listen=here");
  EXPECT_EQ(status, 1);
  EXPECT_THAT(output, AllOf(HasSubstr("'leftover'"), HasSubstr("--device=tpu"),
                            HasSubstr("--policy=fast"), HasSubstr("'none'"),
                            HasSubstr("--log_format=xml"), HasSubstr("--queue_capacity=-2"),
                            HasSubstr("--listen=here"), HasSubstr("--model is required")));
}

TEST(CommandLine, AModelThatIsNotThereIsRefusedWithItsPath) {
  const auto [status, output] = RunPrefilld("--model=/no/such/folder --log_format=json");
  EXPECT_EQ(status, 1);
  EXPECT_THAT(output, AllOf(HasSubstr("\"event\":\"start_failed\""), HasSubstr("load_model"),
                            HasSubstr("/no/such/folder")));
}

}  // namespace
}  // namespace prefilld::server
