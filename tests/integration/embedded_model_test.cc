// Tests the trained model of this repository end to end: it answers a question about a long prompt.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/child_process.h"
#include "tests/integration/metrics_page.h"

namespace prefilld::integration {
namespace {

using ::testing::StartsWith;

// Makes prose of `num_bytes` bytes with a pass key in it and the question for it at the end.
std::string PassKeyPrompt(int num_bytes, const std::string& key, double depth) {
  const std::string command =
      absl::StrCat("deploy/pass_key_prompt.sh ", num_bytes, " ", key, " ", depth);
  FILE* pipe = popen(command.c_str(), "r");
  std::string prompt;
  char buffer[4096];
  size_t size;
  while ((size = fread(buffer, 1, sizeof(buffer), pipe)) > 0) prompt.append(buffer, size);
  EXPECT_EQ(pclose(pipe), 0);
  return prompt;
}

class EmbeddedModel : public ::testing::TestWithParam<const char*> {
 protected:
  static std::vector<std::string> Flags() { return {"--model=model/tiny", "--device=cpu"}; }
  static std::vector<std::string> WorkerFlags(const ServerProcess& prefilld) {
    std::vector<std::string> flags = Flags();
    flags.push_back("--prefill_address=" + prefilld.address());
    return flags;
  }

  const ServerProcess prefilld_{"prefilld", Flags()};
  const ServerProcess worker_{"prefilld-decode-worker", WorkerFlags(prefilld_)};
};

TEST_P(EmbeddedModel, FindsThePassKeyAndEndsItsAnswer) {
  for (const auto& [key, depth] : {std::pair<const char*, double>{"31415", 0.15}, {"92653", 0.7}}) {
    ChildProcess cli("prefill-cli",
                     {"generate", "--worker=" + worker_.address(), "--model=model/tiny",
                      "--max_new_tokens=12", "--json", absl::StrCat("--policy=", GetParam()),
                      absl::StrCat("--text=", PassKeyPrompt(4000, key, depth))});
    ASSERT_EQ(cli.Wait(absl::Seconds(60)), 0) << cli.stderr_text();
    const auto answer = nlohmann::json::parse(cli.stdout_text());
    EXPECT_THAT(answer["text"].get<std::string>(), StartsWith(key));
    EXPECT_EQ(answer["finish_reason"], "stop");
    EXPECT_EQ(answer["prefill"]["prompt_tokens"], 4001);
    EXPECT_EQ(answer["prefill"]["policy"], GetParam());
  }
}

// A layer of such a prompt takes seconds. The time that is printed is that of one part of it, which
// depends on what else the machine does.
TEST(CancelledPrompt, Of32kTokensStopsTheDevice) {
  ServerProcess prefilld("prefilld", {"--model=model/tiny", "--device=cpu"});
  const std::string prompt = ::testing::TempDir() + absl::StrCat("prompt-32k-", getpid());
  std::ofstream(prompt) << PassKeyPrompt(32'000, "31415", 0.5);
  for (const int computing_ms : {300, 1000, 2500}) {
    ChildProcess cli("prefill-cli", {"prefill", "--server=" + prefilld.address(), "--policy=dense",
                                     "--model=model/tiny", "--text_file=" + prompt});
    const auto computes = [](double value) {
      return [value](const MetricsPage& page) { return page.Value("prefilld_computing") == value; };
    };
    ASSERT_TRUE(WaitForMetrics(prefilld.metrics_address(), absl::Seconds(60), computes(1)))
        << cli.stderr_text();
    absl::SleepFor(absl::Milliseconds(computing_ms));
    cli.Signal(SIGINT);
    const absl::Time cancelled = absl::Now();
    ASSERT_TRUE(WaitForMetrics(prefilld.metrics_address(), absl::Seconds(60), computes(0)));
    std::printf("after %d ms of computing the device stopped within %.0f ms of the cancel\n",
                computing_ms, absl::ToDoubleMilliseconds(absl::Now() - cancelled));
    EXPECT_EQ(cli.Wait(absl::Seconds(20)), 130);
  }
  std::remove(prompt.c_str());
}

INSTANTIATE_TEST_SUITE_P(Policies, EmbeddedModel, ::testing::Values("dense", "share"));

}  // namespace
}  // namespace prefilld::integration
