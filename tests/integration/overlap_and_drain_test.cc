// Tests what a consumer sees of a long prefill while it runs, and of servers that are told to stop.
#include <signal.h>

#include <string>
#include <thread>
#include <vector>

#include "absl/base/config.h"
#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/integration/generate_client.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::GenerateEvent;
using ::prefill::v1::PrefillRequest;

constexpr uint32_t kLayers = 12;
constexpr int kLongPrompt = 3000;

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = kLayers;
  config.max_positions = 8192;
  return config;
}

class OverlapAndDrain : public ::testing::Test {
 protected:
  OverlapAndDrain()
      : checkpoint_(Config()),
        prefilld_("prefilld", {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=2",
                               "--drain_timeout_s=60"}),
        prompt_(model::RandomTokens(kLongPrompt, Config().vocab_size, 1)) {}

  PrefillRequest Request() const {
    PrefillRequest request;
    request.mutable_token_ids()->Assign(prompt_.begin(), prompt_.end());
    request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
    return request;
  }

  const model::RandomCheckpoint checkpoint_;
  ServerProcess prefilld_;
  const std::vector<uint32_t> prompt_;
};

// Notes when the last frame of each layer came, and when each layer was reported as computed.
class Timeline : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress& progress) override {
    absl::MutexLock lock(&mu);
    const uint32_t layers = progress.layers_computed();
    if (layers <= kLayers && computed[layers] == absl::InfiniteFuture()) {
      computed[layers] = absl::Now();
    }
    return absl::OkStatus();
  }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    absl::MutexLock lock(&mu);
    arrived[frame.layer] = absl::Now();
    layers_computed[frame.layer] = frame.layers_computed;
    return absl::OkStatus();
  }

  absl::Mutex mu;
  std::vector<absl::Time> computed ABSL_GUARDED_BY(mu) =
      std::vector<absl::Time>(kLayers + 1, absl::InfiniteFuture());
  std::vector<absl::Time> arrived ABSL_GUARDED_BY(mu) =
      std::vector<absl::Time>(kLayers, absl::InfiniteFuture());
  std::vector<uint32_t> layers_computed ABSL_GUARDED_BY(mu) = std::vector<uint32_t>(kLayers);
};

TEST_F(OverlapAndDrain, TheFirstLayersCacheIsHereBeforeAThirdOfTheLayersIsComputed) {
  const auto client = client::PrefillClient::Create({.address = prefilld_.address()});
  Timeline timeline;
  const auto result = (*client)->Prefill(Request(), timeline);
  ASSERT_TRUE(result.ok()) << result.status();
  absl::MutexLock lock(&timeline.mu);
  EXPECT_LE(timeline.layers_computed[0], kLayers / 3);
  EXPECT_LT(timeline.arrived[0], timeline.computed[kLayers / 3]);
  // Every layer but the last few leaves while later layers compute.
  for (uint32_t layer = 0; layer + 4 < kLayers; ++layer) {
    EXPECT_LT(timeline.arrived[layer], timeline.computed[layer + 4]) << "layer " << layer;
  }
}

TEST_F(OverlapAndDrain, SigtermLetsThePrefillServerFinishWhatItHasAccepted) {
  const auto client = client::PrefillClient::Create({.address = prefilld_.address()});
  Timeline timeline;
  absl::StatusOr<::prefill::v1::PrefillResult> running = absl::UnknownError("not called");
  std::thread caller([&] { running = (*client)->Prefill(Request(), timeline); });
  const auto under_way = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(timeline.mu) {
    return timeline.computed[1] != absl::InfiniteFuture();
  };
  {
    absl::MutexLock lock(&timeline.mu);
    ASSERT_TRUE(timeline.mu.AwaitWithTimeout(absl::Condition(&under_way), absl::Seconds(30)));
  }
  prefilld_.Signal(SIGTERM);
  // The open connection still answers, but new requests are refused.
  absl::Status refused;
  for (int i = 0; i < 100 && refused.ok(); ++i) {
    Timeline unused;
    PrefillRequest request;
    request.add_token_ids(1);
    refused = (*client)->Prefill(request, unused).status();
  }
  EXPECT_TRUE(absl::IsUnavailable(refused)) << refused;
  caller.join();
  EXPECT_TRUE(running.ok()) << running.status();
  EXPECT_EQ(prefilld_.Wait(absl::Seconds(20)), 0) << prefilld_.stderr_text();
}

TEST_F(OverlapAndDrain, SigtermLetsTheDecodeWorkerFinishWhatItHasAccepted) {
  ServerProcess worker("prefilld-decode-worker",
                       {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=2",
                        "--prefill_address=" + prefilld_.address(), "--kv_pool_tokens=8192"});
  const std::vector<uint32_t> prompt(prompt_.begin(), prompt_.begin() + 200);
  bool told = false;
  const Generation running =
      Generate(worker.address(), DenseRequest(prompt, 40), [&](const GenerateEvent& event, auto&) {
        if (!event.has_token() || told) return;
        worker.Signal(SIGTERM);
        told = true;
      });
  EXPECT_TRUE(running.status.ok()) << running.status.error_message();
  EXPECT_EQ(running.tokens.size(), 40);
  EXPECT_EQ(worker.Wait(absl::Seconds(20)), 0) << worker.stderr_text();
}

TEST_F(OverlapAndDrain, WhatDoesNotFinishWithinTheDrainTimeIsCancelled) {
  ServerProcess worker("prefilld-decode-worker",
                       {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=2",
                        "--prefill_address=" + prefilld_.address(), "--kv_pool_tokens=8192",
                        "--drain_timeout_s=0.2"});
  bool told = false;
  const Generation running = Generate(worker.address(), DenseRequest(prompt_, 4000),
                                      [&](const GenerateEvent& event, auto&) {
                                        if (!event.has_progress() || told) return;
                                        worker.Signal(SIGTERM);
                                        told = true;
                                      });
  EXPECT_FALSE(running.status.ok());
  EXPECT_EQ(worker.Wait(absl::Seconds(20)), 0) << worker.stderr_text();
}

TEST_F(OverlapAndDrain, ASecondSignalEndsTheDecodeWorkerAtOnce) {
  ServerProcess worker("prefilld-decode-worker",
                       {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=2",
                        "--prefill_address=" + prefilld_.address(), "--kv_pool_tokens=8192",
                        "--drain_timeout_s=3600"});
  bool told = false;
  const Generation running = Generate(
      worker.address(), DenseRequest(prompt_, 4000), [&](const GenerateEvent& event, auto&) {
        if (!event.has_progress() || told) return;
        worker.Signal(SIGTERM);
        // Before the first one was taken, a second one is the same to the system.
        EXPECT_TRUE(worker.AwaitStderr("draining", absl::Seconds(60))) << worker.stderr_text();
        worker.Signal(SIGTERM);
        told = true;
      });
  // The thread sanitizer calls a handler only once the thread has come back from Abseil's wait for
  // the end of the drain.
#if !defined(ABSL_HAVE_THREAD_SANITIZER)
  EXPECT_FALSE(running.status.ok());
#endif
  EXPECT_EQ(worker.Wait(absl::Seconds(20)), 1) << worker.stderr_text();
}

TEST_F(OverlapAndDrain, IdleServersEndAtOnce) {
  ServerProcess worker("prefilld-decode-worker", {"--model=" + checkpoint_.dir(), "--device=cpu",
                                                  "--prefill_address=" + prefilld_.address()});
  for (ServerProcess* server : {&prefilld_, &worker}) {
    server->Signal(SIGTERM);
    EXPECT_EQ(server->Wait(absl::Seconds(10)), 0) << server->stderr_text();
  }
}

}  // namespace
}  // namespace prefilld::integration
