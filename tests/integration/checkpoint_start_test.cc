// Tests the start with a checkpoint: what the programs say about one that is not quite as they
// would have it, and that a signal ends them while they load it.
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// A checkpoint with the fields of `patch` in its config.json.
class PatchedCheckpoint {
 public:
  explicit PatchedCheckpoint(const char* patch) {
    std::ifstream file(checkpoint_.dir() + "/config.json");
    json config = json::parse(std::string(std::istreambuf_iterator<char>(file), {}));
    config.merge_patch(json::parse(patch));
    checkpoint_.WriteFile("config.json", config.dump());
  }
  const model::RandomCheckpoint& checkpoint() const { return checkpoint_; }
  std::string flag() const { return "--model=" + checkpoint_.dir(); }

 private:
  model::RandomCheckpoint checkpoint_;
};

class CheckpointStart : public ::testing::TestWithParam<const char*> {};

TEST_P(CheckpointStart, LogsOnceWhatIsIgnored) {
  const PatchedCheckpoint checkpoint(R"({"auto_map": {"a": "b"}, "logit_scale": 0.5,
      "rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": true}})");
  ServerProcess server(GetParam(),
                       {checkpoint.flag(), "--device=cpu", "--ignore_config=logit_scale"});
  const std::string log = server.stderr_text();
  EXPECT_THAT(log,
              AllOf(HasSubstr("checkpoint_ignored config_keys=\""), HasSubstr("auto_map"),
                    HasSubstr("rope_scaling.finetuned"), HasSubstr("ignore_config=logit_scale")));
  const size_t first = log.find("checkpoint_ignored");
  EXPECT_EQ(log.find("checkpoint_ignored", first + 1), std::string::npos);
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(absl::Seconds(20)), 0);
}

TEST_P(CheckpointStart, RefusesAFieldThatMayMatterByItsName) {
  const PatchedCheckpoint checkpoint(R"({"logit_scale": 0.5})");
  ChildProcess program(GetParam(), {checkpoint.flag(), "--device=cpu"});
  EXPECT_THAT(program.Wait(absl::Seconds(20)), ::testing::Optional(Not(0)));
  EXPECT_THAT(program.stderr_text(), AllOf(HasSubstr("logit_scale 0.5 unsupported"),
                                           HasSubstr("--ignore_config=logit_scale")));
}

TEST_P(CheckpointStart, SaysThatTheWeightsAreAGitLfsPointer) {
  const PatchedCheckpoint checkpoint("{}");
  checkpoint.checkpoint().WriteFile("model.safetensors",
                                    "version https://git-lfs.github.com/spec/v1\n"
                                    "oid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 123\n");
  ChildProcess program(GetParam(), {checkpoint.flag(), "--device=cpu"});
  EXPECT_THAT(program.Wait(absl::Seconds(20)), ::testing::Optional(Not(0)));
  EXPECT_THAT(program.stderr_text(), AllOf(HasSubstr("model.safetensors: is a Git LFS pointer"),
                                           HasSubstr("git lfs pull")));
}

INSTANTIATE_TEST_SUITE_P(Programs, CheckpointStart,
                         ::testing::Values("prefilld", "prefilld-decode-worker"),
                         [](const auto& info) { return info.index == 0 ? "Server" : "Worker"; });

// Nothing is to be drained while the model loads, and the process must not wait for the load.
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
  ASSERT_TRUE(program.AwaitBlocked(SIGTERM, absl::Seconds(20))) << program.stderr_text();
  ASSERT_EQ(program.Wait(absl::Milliseconds(500)), std::nullopt) << program.stderr_text();
  program.Signal(SIGTERM);
  EXPECT_EQ(program.Wait(absl::Seconds(20)), 0) << program.stderr_text();
}

INSTANTIATE_TEST_SUITE_P(Programs, SignalWhileLoading,
                         ::testing::Values("prefilld", "prefilld-decode-worker"),
                         [](const auto& info) { return info.index == 0 ? "Server" : "Worker"; });

}  // namespace

}  // namespace prefilld::integration
