// Tests that prompts of clients that come together are computed together, and that no client can
// tell.
#include <cmath>
#include <cstdint>
#include <iterator>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/integration/metrics_page.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;

constexpr int kLengths[] = {1, 15, 16, 127, 128, 129, 300, 511};
// This prompt keeps the engine busy while the others come. It is too long to be batched.
constexpr int kLongPrompt = 3000;
// GEMMs of more rows may add in another order, in fp32.
constexpr double kTolerance = 1e-4;

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = 6;
  config.max_positions = 4096;
  return config;
}

PrefillRequest Request(int num_tokens) {
  const std::vector<uint32_t> tokens =
      model::RandomTokens(num_tokens, Config().vocab_size, /*seed=*/num_tokens);
  PrefillRequest request;
  request.mutable_token_ids()->Assign(tokens.begin(), tokens.end());
  request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
  request.mutable_layout()->set_dtype(::prefill::v1::DTYPE_FP32);
  request.set_prompt_logprobs(num_tokens % 2 == 1);
  return request;
}

// Keeps a cache by (layer, block).
class Cache : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress& progress) override {
    if (progress.layers_computed() > 0 && !started_.HasBeenNotified()) started_.Notify();
    return absl::OkStatus();
  }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    std::vector<float> values(frame.payload.size() / sizeof(float));
    frame.payload.CopyTo(reinterpret_cast<uint8_t*>(values.data()));
    absl::MutexLock lock(&mu_);
    frames_[{frame.layer, frame.first_block}] = std::move(values);
    return absl::OkStatus();
  }

  void AwaitFirstLayer() { started_.WaitForNotification(); }
  std::map<std::pair<uint32_t, uint32_t>, std::vector<float>> frames() const {
    absl::MutexLock lock(&mu_);
    return frames_;
  }

 private:
  absl::Notification started_;
  mutable absl::Mutex mu_;
  std::map<std::pair<uint32_t, uint32_t>, std::vector<float>> frames_ ABSL_GUARDED_BY(mu_);
};

struct Answer {
  absl::StatusOr<PrefillResult> result = absl::UnknownError("not called");
  Cache cache;
};

void Ask(const std::string& address, int num_tokens, Answer& answer) {
  const auto client = client::PrefillClient::Create({.address = address});
  answer.result = (*client)->Prefill(Request(num_tokens), answer.cache);
}

// Asks all at once, behind a long prompt.
std::vector<Answer> AskTogether(const std::string& address) {
  Answer busy;
  std::thread holder([&] { Ask(address, kLongPrompt, busy); });
  busy.cache.AwaitFirstLayer();
  std::vector<Answer> answers(std::size(kLengths));
  std::vector<std::thread> clients;
  for (size_t i = 0; i < answers.size(); ++i) {
    clients.emplace_back([&, i] { Ask(address, kLengths[i], answers[i]); });
  }
  for (std::thread& client : clients) client.join();
  holder.join();
  EXPECT_TRUE(busy.result.ok()) << busy.result.status();
  return answers;
}

template <typename Values>
void ExpectNear(const Values& actual, const Values& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (int i = 0; i < static_cast<int>(actual.size()); ++i) {
    ASSERT_NEAR(actual[i], expected[i], kTolerance * (1 + std::abs(expected[i]))) << i;
  }
}

TEST(Batching, GivesConcurrentClientsWhatEachGetsAlone) {
  const model::RandomCheckpoint checkpoint(Config(), 11);
  const std::vector<std::string> flags = {"--model=" + checkpoint.dir(), "--device=cpu",
                                          "--cpu_threads=2"};
  std::vector<std::string> batching_flags = flags;
  batching_flags.push_back("--max_batch_tokens=4096");
  ServerProcess plain("prefilld", flags);
  ServerProcess batching("prefilld", batching_flags);
  const std::vector<Answer> answers = AskTogether(batching.address());
  int batched = 0;
  for (size_t i = 0; i < answers.size(); ++i) {
    SCOPED_TRACE(absl::StrCat(kLengths[i], " tokens"));
    Answer alone;
    Ask(plain.address(), kLengths[i], alone);
    ASSERT_TRUE(alone.result.ok()) << alone.result.status();
    EXPECT_EQ(alone.result->batch_prompts(), 1);
    ASSERT_TRUE(answers[i].result.ok()) << answers[i].result.status();
    const PrefillResult& result = *answers[i].result;
    batched += result.batch_prompts() > 1 ? 1 : 0;
    EXPECT_EQ(result.first_token().token_id(), alone.result->first_token().token_id());
    EXPECT_NEAR(result.first_token().logprob(), alone.result->first_token().logprob(), kTolerance);
    ExpectNear(result.prompt_logprobs(), alone.result->prompt_logprobs());
    const auto frames = answers[i].cache.frames();
    const auto expected = alone.cache.frames();
    ASSERT_EQ(frames.size(), expected.size());
    for (const auto& [place, values] : expected) {
      ASSERT_TRUE(frames.contains(place));
      ExpectNear(frames.at(place), values);
    }
  }
  // Prompts that came too late for the first batch are in another one, or alone.
  EXPECT_GE(batched, 2);
  const MetricsPage page(batching.metrics_address());
  EXPECT_EQ(page.Value("prefilld_batch_prompts_sum"), 1 + answers.size());
  EXPECT_LT(page.Value("prefilld_batch_prompts_count"), 1 + answers.size());
}

}  // namespace
}  // namespace prefilld::integration
