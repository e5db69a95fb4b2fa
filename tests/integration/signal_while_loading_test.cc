// Tests SIGTERM while the model loads: there is nothing to drain, and the process must not wait for
// the load.
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"

namespace prefilld::integration {
namespace {

class SignalWhileLoading : public ::testing::TestWithParam<const char*> {
 protected:
  SignalWhileLoading() {
    char name[] = "/tmp/endless_model_XXXXXX";
    folder_ = mkdtemp(name);
    // Opening this file for reading blocks, because no writer ever comes.
    EXPECT_EQ(mkfifo(config().c_str(), 0600), 0);
  }
  ~SignalWhileLoading() override {
    unlink(config().c_str());
    rmdir(folder_.c_str());
  }
  std::string config() const { return folder_ + "/config.json"; }

  std::string folder_;
};

TEST_P(SignalWhileLoading, EndsTheProcessAtOnceWithExitCode0) {
  ChildProcess program(GetParam(), {"--model=" + folder_, "--device=cpu", "--listen=127.0.0.1:0"});
  ASSERT_EQ(program.Wait(absl::Milliseconds(500)), std::nullopt) << program.stderr_text();
  program.Signal(SIGTERM);
  EXPECT_EQ(program.Wait(absl::Seconds(5)), 0) << program.stderr_text();
}

INSTANTIATE_TEST_SUITE_P(Programs, SignalWhileLoading,
                         ::testing::Values("prefilld", "prefilld-decode-worker"),
                         [](const auto& info) { return info.index == 0 ? "Server" : "Worker"; });

}  // namespace
}  // namespace prefilld::integration
