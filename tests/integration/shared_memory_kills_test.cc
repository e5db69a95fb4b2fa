// Tests KV in shared memory between real processes: it is the same as over gRPC, and whoever is
// killed leaves nothing behind. PREFILLD_TEST_KILLS says how many processes are killed.
#include <signal.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/integration/metrics_page.h"
#include "tests/integration/tcp.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::PrefillRequest;

constexpr absl::Duration kPatience = absl::Seconds(60);
constexpr int kPrompt = 1500;  // tens of milliseconds a layer

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = 8;
  config.max_positions = 4096;
  return config;
}

int Kills() {
  const char* const text = getenv("PREFILLD_TEST_KILLS");
  int kills = 0;
  return text != nullptr && absl::SimpleAtoi(text, &kills) ? kills : 20;
}
// A server takes much longer to start.
int KillsOfConsumers() { return Kills() * 3 / 4; }
int KillsOfServers() { return Kills() / 4; }

int64_t CountEntries(const std::string& folder) {
  std::error_code ignored;
  return std::distance(std::filesystem::directory_iterator(folder, ignored), {});
}

int64_t CountLines(const std::string& path, const std::string& part) {
  std::ifstream file(path);
  int64_t count = 0;
  for (std::string line; std::getline(file, line);) count += absl::StrContains(line, part) ? 1 : 0;
  return count;
}

int64_t CountOurs(const std::string& folder) {
  std::error_code ignored;
  int64_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    count += absl::StrContains(entry.path().filename().string(), "prefilld") ? 1 : 0;
  }
  return count;
}

int64_t SharedKilobytes(const std::string& status_path) {
  std::ifstream file(status_path);
  for (std::string name; file >> name;) {
    int64_t kilobytes = 0;
    if (name == "RssShmem:" && file >> kilobytes) return kilobytes;
  }
  return 0;
}

// All that a process, or the machine, could be left with.
struct Leftovers {
  explicit Leftovers(const std::string& process)
      : descriptors(CountEntries("/proc/" + process + "/fd")),
        mappings(CountLines("/proc/" + process + "/maps", "prefilld-kv")),
        shared_kb(SharedKilobytes("/proc/" + process + "/status")) {}

  bool IsNoMoreThan(const Leftovers& other) const {
    return descriptors <= other.descriptors && mappings <= other.mappings &&
           shared_kb <= other.shared_kb && shared <= other.shared;
  }
  // Waits for that, because connections of gRPC take a moment to close.
  static testing::AssertionResult BecomeNoMoreThan(const Leftovers& other,
                                                   const std::string& process) {
    const absl::Time give_up = absl::Now() + kPatience;
    while (!Leftovers(process).IsNoMoreThan(other)) {
      if (absl::Now() > give_up) {
        return testing::AssertionFailure() << Leftovers(process) << "; before: " << other;
      }
      absl::SleepFor(absl::Milliseconds(5));
    }
    return testing::AssertionSuccess();
  }
  friend std::ostream& operator<<(std::ostream& out, const Leftovers& left) {
    return out << left.descriptors << " descriptors, " << left.mappings << " mappings, "
               << left.shared_kb << " kB of shared memory, " << left.shared << " files in /dev/shm";
  }

  int64_t descriptors;
  int64_t mappings;
  int64_t shared_kb;
  int64_t shared = CountOurs("/dev/shm");
};

// Keeps the payload of each run of blocks, and harms somebody at the first frame in shared memory.
class Sink : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted& accepted) override {
    sockets.assign(accepted.shared_memory().sockets().begin(),
                   accepted.shared_memory().sockets().end());
    return absl::OkStatus();
  }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  void OnSharedMemory(const absl::Status& status) override { attached = status; }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    std::string payload(frame.payload.size(), '\0');
    frame.payload.CopyTo(reinterpret_cast<uint8_t*>(payload.data()));
    absl::MutexLock lock(&mu_);
    payloads[{frame.layer, frame.first_block}] = std::move(payload);
    if (frame.shared_bytes > 0 && harm != nullptr) std::exchange(harm, nullptr)();
    return absl::OkStatus();
  }

  absl::Status attached = absl::UnknownError("not told");
  std::vector<std::string> sockets;
  std::function<void()> harm = nullptr;
  std::map<std::pair<uint32_t, uint32_t>, std::string> payloads;

 private:
  absl::Mutex mu_;
};

class SharedMemoryKills : public ::testing::Test {
 protected:
  SharedMemoryKills() : checkpoint_(Config()) {
    folder_ = (std::filesystem::temp_directory_path() / "prefilld-kv-XXXXXX").string();
    if (mkdtemp(folder_.data()) == nullptr) abort();
    const auto prompt = model::RandomTokens(kPrompt, Config().vocab_size, 1);
    request_.mutable_token_ids()->Assign(prompt.begin(), prompt.end());
    request_.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
  }
  ~SharedMemoryKills() override { std::filesystem::remove_all(folder_); }

  std::unique_ptr<ServerProcess> StartServer(int resume_window_s = 0) const {
    return std::make_unique<ServerProcess>(
        "prefilld",
        std::vector<std::string>{"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=2",
                                 absl::StrCat("--resume_window_s=", resume_window_s),
                                 "--shared_memory_dir=" + folder_, "--frame_bytes=1048576"});
  }
  static std::unique_ptr<client::PrefillClient> NewClient(const ServerProcess& server) {
    return *client::PrefillClient::Create({.address = server.address()});
  }

  const model::RandomCheckpoint checkpoint_;
  std::string folder_;
  PrefillRequest request_;
};

TEST_F(SharedMemoryKills, TheCacheIsTheSameAsOverGrpc) {
  const auto server = StartServer();
  const auto client = NewClient(*server);
  Sink over_grpc;
  const auto result = client->Prefill(request_, over_grpc, {.shared_memory = false});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->shared_memory_bytes(), 0);
  for (const uint32_t lanes : {1, 4}) {
    request_.set_num_lanes(lanes);
    Sink in_memory;
    const auto again = client->Prefill(request_, in_memory, {.resumable = lanes > 1});
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(in_memory.attached.ok()) << in_memory.attached;
    EXPECT_GT(again->shared_memory_bytes(), 0);
    EXPECT_EQ(in_memory.payloads, over_grpc.payloads);
  }
}

// The socket of the memory stays open, and the frames that lie there are told again.
TEST_F(SharedMemoryKills, ACutConnectionIsResumedAndTheMemoryGoesOn) {
  const auto server = StartServer(/*resume_window_s=*/10);
  Sink whole;
  ASSERT_TRUE(NewClient(*server)->Prefill(request_, whole, {.shared_memory = false}).ok());
  TcpProxy proxy(server->address());
  auto client = *client::PrefillClient::Create({.address = proxy.address()});
  request_.set_num_lanes(2);
  Sink sink;
  sink.harm = [&proxy] { proxy.Cut(); };
  const auto result = client->Prefill(request_, sink, {.resumable = true});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(sink.harm, nullptr) << "no frame came in shared memory";
  EXPECT_EQ(sink.payloads, whole.payloads);
  EXPECT_GT(result->shared_memory_bytes(), 0);
  client.reset();  // keeps the memory for its next call until then
  EXPECT_TRUE(WaitForMetrics(server->metrics_address(), kPatience, [](const MetricsPage& page) {
    return page.Value("prefilld_resumed_streams_total") >= 1 &&
           page.Value("prefilld_shared_memory_bytes") == 0;
  }));
}

TEST_F(SharedMemoryKills, AConsumerThatIsKilledLeavesNothingBehind) {
  const auto server = StartServer();
  const std::string metrics = server->metrics_address();
  std::string ids;
  for (const uint32_t id : request_.token_ids()) absl::StrAppend(&ids, id, ",");
  const std::string attached = "prefilld_shared_memory_connections_total{result=\"attached\"}";
  std::unique_ptr<Leftovers> before;
  for (int kill = 1; kill <= KillsOfConsumers(); ++kill) {
    ChildProcess consumer("prefill-cli", {"prefill", "--server=" + server->address(), "--lanes=2",
                                          "--policy=dense", "--token_ids=" + ids});
    ASSERT_TRUE(WaitForMetrics(metrics, kPatience, [&](const auto& page) {
      return page.Value(attached) == kill;
    })) << consumer.stderr_text();
    consumer.Signal(SIGKILL);
    ASSERT_TRUE(WaitForMetrics(metrics, kPatience, [](const auto& page) {
      return page.Value("prefilld_live_requests") == 0 &&
             page.Value("prefilld_shared_memory_bytes") == 0 &&
             page.Value("prefilld_shared_memory_attachments") == 0 &&
             page.Value("prefilld_staged_bytes") == 0;
    })) << MetricsPage(metrics).text();
    const std::string pid = absl::StrCat(server->pid());
    // The first one leaves what every process has after its first request.
    if (before == nullptr) before = std::make_unique<Leftovers>(pid);
    ASSERT_TRUE(Leftovers::BecomeNoMoreThan(*before, pid)) << "after " << kill;
  }
  EXPECT_EQ(before->mappings, 0);
  EXPECT_EQ(CountEntries(folder_), 1);
  Sink sink;
  const auto result = NewClient(*server)->Prefill(request_, sink);
  EXPECT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(sink.attached.ok()) << sink.attached;
}

TEST_F(SharedMemoryKills, AServerThatIsKilledLeavesNothingBehind) {
  std::unique_ptr<Leftovers> before;
  for (int kill = 1; kill <= KillsOfServers(); ++kill) {
    const auto server = StartServer();
    ASSERT_EQ(CountEntries(folder_), 1) << "the socket of the server before is left";
    Sink sink;
    sink.harm = [&server] { server->Signal(SIGKILL); };
    {
      const auto client = NewClient(*server);
      const auto result = client->Prefill(request_, sink);
      EXPECT_TRUE(absl::IsUnavailable(result.status())) << result.status();
    }
    EXPECT_EQ(sink.harm, nullptr) << "no frame came in shared memory";
    ASSERT_EQ(sink.sockets.size(), 2);
    const std::string name = sink.sockets[0].substr(sink.sockets[0].find(':') + 1);
    EXPECT_EQ(CountLines("/proc/net/unix", name), 0);
    if (before == nullptr) before = std::make_unique<Leftovers>("self");
    ASSERT_TRUE(Leftovers::BecomeNoMoreThan(*before, "self")) << "after " << kill;
  }
  EXPECT_EQ(before->mappings, 0);
}

}  // namespace
}  // namespace prefilld::integration
