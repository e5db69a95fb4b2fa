// The decode worker and the command-line client: what they do with their command lines.
#include <cstdio>
#include <string>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include "absl/strings/str_cat.h"

namespace prefilld::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// Exit status and everything printed.
std::pair<int, std::string> RunProgram(const char* program, const std::string& flags) {
  FILE* pipe = popen(absl::StrCat(program, " ", flags, " 2>&1").c_str(), "r");
  std::string output;
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output.append(buffer, n);
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
}

TEST(WorkerCommandLine, EveryProblemIsListed) {
  const auto [status, output] =
      RunProgram(WORKER_BINARY, "--lanes=17 --kv_order=hdn --max_requests=0");
  EXPECT_EQ(status, 2);
  EXPECT_THAT(output, AllOf(HasSubstr("--lanes=17"), HasSubstr("--kv_order=hdn"),
                            HasSubstr("--max_requests=0"), HasSubstr("--model is required")));
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
