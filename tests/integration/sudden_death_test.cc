// Tests the sudden death of each process in the middle of a transfer: the work stops within two
// layers, everything it held comes back, and the next request succeeds. Nobody is waited for here;
// tests/python/broken_connections_test.py has transfers that are resumed.
#include <signal.h>

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/integration/generate_client.h"
#include "tests/integration/metrics_page.h"
#include "tests/integration/tcp.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::GenerateEvent;
using ::prefill::v1::PrefillRequest;
using ::testing::HasSubstr;

constexpr int kLongPrompt = 6000;  // a good part of a second a layer
constexpr absl::Duration kPatience = absl::Seconds(30);

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = 12;
  config.max_positions = 8192;
  return config;
}

class NullSink : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
};

class SuddenDeath : public ::testing::Test {
 protected:
  SuddenDeath()
      : checkpoint_(Config()),
        prefilld_("prefilld", {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=2",
                               "--deliver_to_allow=127.0.0.1:*", "--resume_window_s=0"}),
        long_prompt_(model::RandomTokens(kLongPrompt, Config().vocab_size, 1)) {}

  std::vector<std::string> WorkerFlags(const std::string& prefill_address) const {
    return {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=1",
            "--prefill_address=" + prefill_address, "--kv_pool_tokens=8192"};
  }

  MetricsPage Scrape() const { return MetricsPage(prefilld_.metrics_address()); }

  void WaitForLayers(int layers) const {
    ASSERT_TRUE(WaitForMetrics(prefilld_.metrics_address(), kPatience, [&](const auto& page) {
      return page.Value("prefilld_steps_total") >= layers &&
             page.Value("prefilld_live_requests") == 1;
    }));
  }

  // Runs `harm` in the middle of the prefill.
  void ExpectItStopsWithinTwoLayers(const std::function<void()>& harm) const {
    WaitForLayers(3);
    harm();
    const double before = Scrape().Value("prefilld_steps_total");
    ASSERT_LE(before, Config().num_layers - 4) << "too late to tell";
    EXPECT_TRUE(WaitForMetrics(prefilld_.metrics_address(), kPatience, [&](const auto& page) {
      return page.Value("prefilld_live_requests") == 0 &&
             page.Value("prefilld_running_requests") == 0 &&
             page.Value("prefilld_staged_bytes") == 0;
    })) << Scrape().text();
    EXPECT_LE(Scrape().Value("prefilld_steps_total"), before + 2);
  }

  // This also shows that the memory of the layers is free, because the request could not run
  // otherwise.
  void ExpectTheNextRequestSucceeds() const {
    PrefillRequest request;
    request.mutable_token_ids()->Assign(long_prompt_.begin(), long_prompt_.begin() + 500);
    NullSink sink;
    const auto client = client::PrefillClient::Create({.address = prefilld_.address()});
    const auto result = (*client)->Prefill(request, sink);
    EXPECT_TRUE(result.ok()) << result.status();
  }

  static void ExpectAllBlocksFree(const ServerProcess& worker) {
    EXPECT_TRUE(WaitForMetrics(worker.metrics_address(), kPatience, [](const auto& page) {
      return page.Value("prefilld_decode_kv_free_blocks") ==
                 page.Value("prefilld_decode_kv_blocks") &&
             page.Value("prefilld_decode_running_requests") == 0;
    }));
  }

  std::string LongPromptIds() const {
    std::string ids;
    for (const uint32_t id : long_prompt_) absl::StrAppend(&ids, id, ",");
    return ids;
  }

  const model::RandomCheckpoint checkpoint_;
  const ServerProcess prefilld_;
  const std::vector<uint32_t> long_prompt_;
};

TEST_F(SuddenDeath, TheDecodeWorkerIsKilled) {
  ServerProcess worker("prefilld-decode-worker", WorkerFlags(prefilld_.address()));
  Generation generation;
  std::thread caller(
      [&] { generation = Generate(worker.address(), DenseRequest(long_prompt_, 4)); });
  ExpectItStopsWithinTwoLayers([&] { worker.Signal(SIGKILL); });
  caller.join();
  EXPECT_EQ(generation.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  ExpectTheNextRequestSucceeds();
}

TEST_F(SuddenDeath, TheClientOfTheWorkerIsKilled) {
  ServerProcess worker("prefilld-decode-worker", WorkerFlags(prefilld_.address()));
  ChildProcess cli("prefill-cli", {"generate", "--worker=" + worker.address(), "--policy=dense",
                                   "--token_ids=" + LongPromptIds()});
  ExpectItStopsWithinTwoLayers([&] { cli.Signal(SIGKILL); });
  ExpectAllBlocksFree(worker);
  ExpectTheNextRequestSucceeds();
}

TEST_F(SuddenDeath, TheClientOfTheWorkerIsInterrupted) {
  ServerProcess worker("prefilld-decode-worker", WorkerFlags(prefilld_.address()));
  ChildProcess cli("prefill-cli", {"generate", "--worker=" + worker.address(), "--policy=dense",
                                   "--token_ids=" + LongPromptIds()});
  ExpectItStopsWithinTwoLayers([&] { cli.Signal(SIGINT); });
  EXPECT_EQ(cli.Wait(kPatience), 130);
  ExpectAllBlocksFree(worker);
}

TEST_F(SuddenDeath, AConsumerWithSeveralLanesIsKilled) {
  ChildProcess cli("prefill-cli", {"prefill", "--server=" + prefilld_.address(), "--lanes=4",
                                   "--policy=dense", "--token_ids=" + LongPromptIds()});
  ExpectItStopsWithinTwoLayers([&] { cli.Signal(SIGKILL); });
  ExpectTheNextRequestSucceeds();
}

TEST_F(SuddenDeath, TheConnectionIsCut) {
  TcpProxy proxy(prefilld_.address());
  ServerProcess worker("prefilld-decode-worker", WorkerFlags(proxy.address()));
  Generation generation;
  std::thread caller(
      [&] { generation = Generate(worker.address(), DenseRequest(long_prompt_, 4)); });
  ExpectItStopsWithinTwoLayers([&] { proxy.Cut(); });
  caller.join();
  EXPECT_EQ(generation.status.error_code(), grpc::StatusCode::UNAVAILABLE)
      << generation.status.error_message();
  ExpectAllBlocksFree(worker);

  // The worker connects anew by itself.
  const std::vector<uint32_t> prompt(long_prompt_.begin(), long_prompt_.begin() + 300);
  generation = Generate(worker.address(), DenseRequest(prompt, 4));
  EXPECT_TRUE(generation.status.ok()) << generation.status.error_message();
}

TEST_F(SuddenDeath, TheReceiverOfAPushIsKilled) {
  ServerProcess worker("prefilld-decode-worker", WorkerFlags(""));
  ::prefill::v1::GenerateRequest request = DenseRequest(long_prompt_, 4);
  request.set_pushed_transfer_id("t");
  absl::Notification started;
  PrefillRequest push;
  push.mutable_token_ids()->Assign(long_prompt_.begin(), long_prompt_.end());
  push.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
  push.mutable_deliver_to()->set_address(worker.address());
  push.mutable_deliver_to()->set_transfer_id("t");
  std::thread caller([&] {
    Generate(worker.address(), request, [&](const GenerateEvent& event, auto&) {
      if (!event.has_started()) return;
      *push.mutable_layout() = event.started().kv_layout();
      started.Notify();
    });
  });
  started.WaitForNotification();
  absl::Status pushed;
  std::thread router([&] {
    NullSink sink;
    const auto client = client::PrefillClient::Create({.address = prefilld_.address()});
    pushed = (*client)->Prefill(push, sink).status();
  });
  ExpectItStopsWithinTwoLayers([&] { worker.Signal(SIGKILL); });
  router.join();
  caller.join();
  EXPECT_TRUE(absl::IsUnavailable(pushed)) << pushed;
  ExpectTheNextRequestSucceeds();
}

TEST_F(SuddenDeath, ThePrefillServerIsKilled) {
  ServerProcess victim("prefilld", {"--model=" + checkpoint_.dir(), "--device=cpu"});
  ServerProcess worker("prefilld-decode-worker", WorkerFlags(victim.address()));
  const Generation generation = Generate(worker.address(), DenseRequest(long_prompt_, 4),
                                         [&](const GenerateEvent& event, auto&) {
                                           if (event.progress().kv_bytes() > 0)
                                             victim.Signal(SIGKILL);
                                         });
  EXPECT_EQ(generation.status.error_code(), grpc::StatusCode::UNAVAILABLE)
      << generation.status.error_message();
  ExpectAllBlocksFree(worker);
}

}  // namespace
}  // namespace prefilld::integration
