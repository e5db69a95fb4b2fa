// Tests the command lines of the decode worker and of the command-line client.
#include <string>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/proto/program_run.h"

namespace prefilld::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::pair<int, std::string> RunProgram(const char* program, const std::string& flags) {
  return RunCommand(absl::StrCat(program, " ", flags));
}

TEST(WorkerCommandLine, HelpListsEveryFlagWithItsDefault) {
  ExpectHelpListsEveryFlag(WORKER_BINARY);
}

TEST(WorkerCommandLine, OpenMpThreadsThatWaitSleep) { ExpectOpenMpThreadsSleep(WORKER_BINARY); }

TEST(CliCommandLine, HelpListsEveryFlagWithItsDefault) { ExpectHelpListsEveryFlag(CLI_BINARY); }

TEST(CliCommandLine, HelpIsGivenBehindACommandAndIsNoFlagsValue) {
  EXPECT_EQ(RunProgram(CLI_BINARY, "generate --text x --help").first, 0);
  // Here --help is the text of the prompt, and nobody listens at the address.
  EXPECT_EQ(RunProgram(CLI_BINARY, "generate --worker=127.0.0.1:1 --model=model/tiny --text --help")
                .first,
            3);
}

TEST(CliCommandLine, HealthOfAServerThatIsNotThereIsUnavailable) {
  const auto [status, output] =
      RunProgram(CLI_BINARY, "health --server=127.0.0.1:1 --service=liveness --timeout_s=2");
  EXPECT_EQ(status, 3) << output;
}

TEST(WorkerCommandLine, EveryProblemIsListed) {
  const auto [status, output] =
      RunProgram(WORKER_BINARY, "--lanes=17 --kv_order=hdn --max_requests=0");
  EXPECT_EQ(status, 2);
  EXPECT_THAT(output, AllOf(HasSubstr("--lanes=17"), HasSubstr("--kv_order=hdn"),
                            HasSubstr("--max_requests=0"), HasSubstr("--model is required")));
}

TEST(WorkerCommandLine, KvInFp8HasScales) {
  const auto [status, output] = RunProgram(WORKER_BINARY, "--kv_dtype=fp16 --kv_scales=none");
  EXPECT_EQ(status, 2);
  EXPECT_THAT(output, AllOf(HasSubstr("--kv_dtype=fp16 is not one of native, fp8_e4m3"),
                            HasSubstr("--kv_scales=none is not one of per_token, per_block")));
  EXPECT_THAT(RunProgram(WORKER_BINARY, "--kv_scales=per_block").second,
              HasSubstr("--kv_scales=per_block needs --kv_dtype=fp8_e4m3"));
}

TEST(CliCommandLine, LanesAreAutoOrNumbers) {
  for (const char* lanes : {"0", "17", "four", "1,4"}) {
    const auto [status, output] =
        RunProgram(CLI_BINARY, absl::StrCat("prefill --token_ids=1 --lanes=", lanes));
    EXPECT_EQ(status, 2) << lanes;
    EXPECT_THAT(output, HasSubstr(absl::StrCat("--lanes=", lanes)));
  }
  const auto [status, output] = RunProgram(CLI_BINARY, "bench-kv --lanes=1,17");
  EXPECT_EQ(status, 2);
  EXPECT_THAT(output, AllOf(HasSubstr("--lanes=1,17"), HasSubstr("bench-kv needs --peer")));
}

TEST(WorkerCommandLine, AddressesThatNobodyCanListenOnOrDialAreRefused) {
  const auto [status, output] = RunProgram(
      WORKER_BINARY,
      "--model=/nowhere --listen=here --metrics_listen=:9464 --prefill_address=127.0.0.1:");
  EXPECT_EQ(status, 2);
  EXPECT_THAT(output, AllOf(HasSubstr("--listen=here is not host:port"),
                            HasSubstr("--metrics_listen=:9464 is not host:port"),
                            HasSubstr("--prefill_address=127.0.0.1: is not host:port")));
}

TEST(CliCommandLine, AddressesThatNobodyCanDialAreRefused) {
  const auto [status, output] = RunProgram(CLI_BINARY,
                                           "prefill --token_ids=1 --server=host:0 --worker=host "
                                           "--deliver_to=http://host:1 --transfer_id=t");
  EXPECT_EQ(status, 2);
  EXPECT_THAT(output, AllOf(HasSubstr("--server=host:0 is not host:port"),
                            HasSubstr("--worker=host is not host:port"),
                            HasSubstr("--deliver_to=http://host:1 is not host:port")));
}

}  // namespace
}  // namespace prefilld::client
