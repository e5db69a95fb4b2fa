// Tests that short prompts that wait are computed together, and that each ends by itself.
#include <memory>
#include <utility>
#include <vector>

#include <gmock/gmock.h>

#include "server/prompt_speed.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

using Calls = std::vector<std::unique_ptr<OpenStream>>;

class Batch : public ServerFixture {
 protected:
  Batch() { engine_options_.max_batch_tokens = 1000; }

  // The policy is set because long prompts would be sparse by default.
  static v1::PrefillRequest DensePromptOf(int num_tokens) {
    v1::PrefillRequest request = PromptOf(num_tokens);
    request.mutable_attention()->set_policy(v1::ATTENTION_POLICY_DENSE);
    return request;
  }

  std::unique_ptr<OpenStream> Submit(const v1::PrefillRequest& request) {
    auto call = std::make_unique<OpenStream>(*NewStub(), request);
    call->ReadUntil(v1::PrefillEvent::kAccepted);
    return call;
  }
  // Runs a prompt that holds the engine, alone in its pass, because it is too long for a batch.
  std::unique_ptr<OpenStream> HoldEngine() {
    engine_->HoldAfter(0);
    auto call = Submit(PromptOf(static_cast<int>(engine_options_.max_batch_tokens) + 1));
    EXPECT_TRUE(Eventually([this] { return engine_->alive() == 1; }));
    return call;
  }
  // Queues prompts of these lengths behind a held engine, then lets it go on, for no more than
  // `layers` layers. The held prompt of 1001 tokens has run one layer before.
  Calls RunTogether(const std::vector<int>& lengths, int layers = -1) {
    const auto holder = HoldEngine();
    Calls calls;
    for (const int length : lengths) calls.push_back(Submit(DensePromptOf(length)));
    LetGo(*holder, layers);
    return calls;
  }
  void LetGo(OpenStream& holder, int layers) {
    holder.Cancel();
    EXPECT_TRUE(Eventually([this] { return Cancelled() == 1; }));
    engine_->HoldAfter(layers);
    EXPECT_TRUE(Eventually([this] { return engine_->started() >= 2; }));
  }
  double Cancelled() const { return Metric("prefilld_requests_total{outcome=\"cancelled\"}"); }
};

TEST_F(Batch, OfPromptsThatWaitIsOnePass) {
  StartServer();
  const Calls calls = RunTogether({10, 20, 300});
  for (const auto& call : calls) {
    const StreamContents contents = call->Rest();
    ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
    EXPECT_EQ(contents.result()->batch_prompts(), 3);
  }
  EXPECT_THAT(engine_->lengths(), ElementsAre(ElementsAre(1001), ElementsAre(10, 20, 300)));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_batch_prompts_count"), 2);
  EXPECT_EQ(Metric("prefilld_batch_prompts_sum"), 4);
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"ok\"}"), 3);
}

TEST_F(Batch, GivesEachItsTokenAndItsCache) {
  engine_options_.max_batch_tokens = 40'000;
  StartServer();
  const auto holder = HoldEngine();
  const std::vector<int> lengths = {20'000, 1, 16, 17, 300};  // read in this order
  Calls calls;
  std::vector<v1::KvLayout> layouts;
  for (const int length : lengths) {
    v1::PrefillRequest request = DensePromptOf(length);
    if (length == 300) request.mutable_layout()->set_first_block(19);  // of 19: it has them all
    if (length == 17) request.mutable_layout()->set_order(v1::KV_ORDER_HND);
    calls.push_back(std::make_unique<OpenStream>(*NewStub(), request));
    layouts.push_back(calls.back()->ReadUntil(v1::PrefillEvent::kAccepted).accepted().layout());
  }
  engine_->HoldAfter(-1);
  EXPECT_NE(holder->Rest().result(), nullptr);
  for (size_t i = 0; i < calls.size(); ++i) {
    const StreamContents contents = calls[i]->Rest();
    ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
    EXPECT_EQ(contents.result()->num_tokens(), lengths[i]);
    EXPECT_EQ(contents.result()->first_token().token_id(), (lengths[i] - 1) % 250 + 1);
    ExpectWholeCache(contents.frames(), layouts[i]);
  }
  EXPECT_EQ(engine_->started(), 2);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Batch, LeavesLongAndSparsePromptsToThemselves) {
  StartServer();
  const auto holder = HoldEngine();
  Calls calls;
  v1::PrefillRequest sparse = PromptOf(50);
  sparse.mutable_attention()->set_policy(v1::ATTENTION_POLICY_SHARE);
  for (const auto& request : {PromptOf(100), PromptOf(1500), sparse, PromptOf(200)}) {
    calls.push_back(Submit(request));
  }
  engine_->HoldAfter(-1);
  for (const auto& call : calls) EXPECT_NE(call->Rest().result(), nullptr);
  EXPECT_THAT(engine_->lengths(), UnorderedElementsAre(ElementsAre(1001), ElementsAre(100, 200),
                                                       ElementsAre(1500), ElementsAre(50)));
}

// Nobody comes for the second half, and the others need not wait for it.
TEST_F(Batch, LeavesARequestOfSeveralReceiversToItself) {
  StartServer();
  const auto holder = HoldEngine();
  v1::PrefillRequest shared = DensePromptOf(10);
  shared.set_num_receivers(2);
  const auto awaiting = Submit(shared);
  const auto one = Submit(DensePromptOf(20)), other = Submit(DensePromptOf(30));
  LetGo(*holder, -1);
  for (const auto* call : {&one, &other}) {
    const StreamContents contents = (*call)->Rest();
    ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
    EXPECT_EQ(contents.result()->batch_prompts(), 2);
  }
  awaiting->Cancel();
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Batch, IsFilledUpInTheOrderOfTheQueue) {
  StartServer();
  const auto holder = HoldEngine();
  Calls calls;
  for (const int length : {600, 500, 300, 200, 100}) {
    calls.push_back(Submit(DensePromptOf(length)));
    // The first has waited for longest by far, so the batch is made around it.
    if (calls.size() == 1) clock_.Advance(absl::Seconds(2));
  }
  LetGo(*holder, /*layers=*/-1);
  for (const auto& call : calls) EXPECT_NE(call->Rest().result(), nullptr);
  EXPECT_THAT(engine_->lengths(),
              ElementsAre(ElementsAre(1001), ElementsAre(600, 300, 100), ElementsAre(500, 200)));
}

TEST_F(Batch, IsNoneWhereThereIsNoRoomForAny) {
  engine_options_.max_batch_tokens = 0;
  StartServer();
  const auto holder = HoldEngine();
  const auto first = Submit(PromptOf(10)), second = Submit(PromptOf(10));
  engine_->HoldAfter(-1);
  EXPECT_EQ(first->Rest().result()->batch_prompts(), 1);
  EXPECT_EQ(second->Rest().result()->batch_prompts(), 1);
  EXPECT_EQ(engine_->started(), 3);
}

TEST_F(Batch, CountsAllOfItsPrompts) {
  StartServer();
  const Calls calls = RunTogether({10, 20, 30}, /*layers=*/1);
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_running_requests") == 3; }));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_steps_total") == 2; }));
  EXPECT_EQ(Metric("prefilld_step_tokens_total"), 1001 + 60);
  EXPECT_EQ(Metric("prefilld_heads_total{kind=\"dense\"}"), 4 + 3 * 4);
  const auto next = std::make_unique<OpenStream>(*stub_, PromptOf(5));
  EXPECT_EQ(next->ReadUntil(v1::PrefillEvent::kAccepted).accepted().queue_position(), 3);
}

TEST_F(Batch, GoesOnWithoutAPromptThatIsCancelled) {
  StartServer();
  const Calls calls = RunTogether({10, 20, 30}, /*layers=*/2);
  calls[1]->ReadUntil(v1::PrefillEvent::kKvFrame);
  calls[1]->Cancel();
  EXPECT_TRUE(Eventually([&] { return Cancelled() == 2; }));
  engine_->HoldAfter(-1);
  for (const size_t i : {0, 2}) {
    const StreamContents contents = calls[i]->Rest();
    ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
    EXPECT_EQ(contents.frames().size(), 4u);  // one a layer
  }
  EXPECT_EQ(engine_->layers_run(), 1 + 4);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Batch, StopsAtTheNextLayerWhenAllItsPromptsHaveEnded) {
  StartServer();
  const Calls calls = RunTogether({10, 20}, /*layers=*/2);
  for (const auto& call : calls) call->ReadUntil(v1::PrefillEvent::kKvFrame);
  for (const auto& call : calls) call->Cancel();
  EXPECT_TRUE(Eventually([&] { return Cancelled() == 3; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->layers_run(), 1 + 3);
  EXPECT_TRUE(Prefill(PromptOf(10)).status.ok());
}

TEST_F(Batch, EndsAPromptAtItsOwnDeadline) {
  StartServer();
  const auto holder = HoldEngine();
  OpenStream hasty(*stub_, PromptOf(10), absl::Now() + absl::Seconds(15));
  hasty.ReadUntil(v1::PrefillEvent::kAccepted);
  const auto patient = Submit(PromptOf(20));
  LetGo(*holder, 2);
  clock_.Advance(absl::Seconds(20));  // less than a stall
  const StreamContents rest = hasty.Rest();
  EXPECT_EQ(rest.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  engine_->HoldAfter(-1);
  EXPECT_NE(patient->Rest().result(), nullptr);
}

class BatchWithALargePrompt : public Batch {
 protected:
  BatchWithALargePrompt() { engine_options_.max_batch_tokens = 50'000; }

  static constexpr int kLarge = 40'000;  // more than the sockets of an idle reader take in
};

// All layers are computed, the last one included, so a request whose frames have left is done.
TEST_F(BatchWithALargePrompt, GivesAPromptItsResultThoughAnothersConsumerStandsStill) {
  engine_options_.num_layers = 3;
  engine_options_.kv_slots = 3;
  StartServer();
  const Calls calls = RunTogether({kLarge, 100});
  const StreamContents contents = calls[1]->Rest();
  ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
  EXPECT_EQ(contents.result()->batch_prompts(), 2);
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_running_requests") == 1; }))
      << "the other one is still at it";
  const StreamContents large = calls[0]->Rest();
  ASSERT_NE(large.result(), nullptr) << large.status.error_message();
}

TEST_F(BatchWithALargePrompt, SendsAPromptsLayersThoughAnothersConsumerStandsStill) {
  options_.pack_threads = 1;  // which must not wait for the other's credit
  StartServer();
  const Calls calls = RunTogether({kLarge, 100});
  for (int layer = 0; layer < engine_options_.kv_slots; ++layer) {
    EXPECT_EQ(calls[1]->ReadUntil(v1::PrefillEvent::kKvFrame).kv_frame().layer(), layer);
  }
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(engine_->layers_run(), 1 + 3) << "the fourth has no slot";
  clock_.Advance(options_.stall_timeout + absl::Seconds(1));
  EXPECT_NE(calls[1]->Rest().result(), nullptr);
  const grpc::Status status = calls[0]->Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("took nothing"));
  EXPECT_TRUE(EverythingIsFree());
}

// The other prompt waits to the end: of 8 layers its last five need what the slow consumer has yet
// to take, 100 MB, and until it is cut off that takes at most 40 MB and what fits into sockets.
TEST_F(BatchWithALargePrompt, CutsOffASlowConsumerForTheOthersWait) {
  engine_options_.num_layers = 8;
  StartServer();
  const Calls calls = RunTogether({kLarge, 100});
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") >= 4 << 20; }));
  // The consumer is never at a standstill, and far below 50 MB/s.
  const auto cut_off = [&] { return Metric("prefilld_requests_total{outcome=\"too_slow\"}") == 1; };
  for (int i = 0; i < 10 && TakeUntilNoticed(*calls[0]); ++i) clock_.Advance(absl::Seconds(5));
  EXPECT_TRUE(Eventually(cut_off));
  EXPECT_NE(calls[1]->Rest().result(), nullptr);
  EXPECT_EQ(calls[0]->Rest().status.error_code(), grpc::StatusCode::ABORTED);
}

TEST_F(BatchWithALargePrompt, BearsASlowConsumerOnceTheOthersHaveEnded) {
  StartServer();
  const Calls calls = RunTogether({kLarge, 100});
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") >= 4 << 20; }));
  calls[1]->Cancel();
  EXPECT_TRUE(Eventually([&] { return Cancelled() == 2; }));
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(TakeUntilNoticed(*calls[0]));
    clock_.Advance(absl::Seconds(5));
  }
  const StreamContents contents = calls[0]->Rest();
  EXPECT_NE(contents.result(), nullptr) << contents.status.error_message();
}

TEST_F(Batch, IsReachedInTimeByAShortPromptThatOvertakesTheQueue) {
  StartServer();
  engine_->set_on_layer([this](int64_t) { clock_.Advance(absl::Seconds(1)); });
  const v1::PrefillRequest long_one = PromptOf(1500);
  for (int i = 0; i < PromptSpeed::kMinSamples; ++i) {
    EXPECT_TRUE(Prefill(long_one).status.ok());  // 4 s
  }
  engine_->set_on_layer(nullptr);
  engine_->HoldAfter(0);
  const auto holder = Submit(long_one);
  EXPECT_TRUE(Eventually([&] { return engine_->alive() == 1; }));
  Calls queue;
  queue.push_back(Submit(DensePromptOf(10)));
  for (int i = 0; i < 20; ++i) queue.push_back(Submit(long_one));  // 80 s
  const auto in_time = [](absl::Duration time) { return absl::Now() + time; };
  OpenStream refused(*NewStub(), long_one, in_time(absl::Seconds(36)));
  EXPECT_THAT(refused.Rest().status.error_message(), HasSubstr("the queue takes"));
  OpenStream joins(*NewStub(), DensePromptOf(20), in_time(absl::Seconds(36)));
  joins.ReadUntil(v1::PrefillEvent::kAccepted);
  engine_->HoldAfter(-1);
  const StreamContents contents = joins.Rest();
  ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
  EXPECT_EQ(contents.result()->batch_prompts(), 2);
}

TEST_F(Batch, IsNoLargerThanTheDeadlinesOfItsPromptsAllow) {
  engine_options_.max_batch_tokens = 4000;
  StartServer();
  for (int i = 0; i < PromptSpeed::kMinSamples; ++i) {
    const auto holder = HoldEngine();
    Calls pair;
    for (int j = 0; j < 2; ++j) pair.push_back(Submit(DensePromptOf(2000)));
    holder->Cancel();
    EXPECT_TRUE(Eventually([&] { return Cancelled() == i + 1; }));
    engine_->HoldAfter(1);
    pair.front()->ReadUntil(v1::PrefillEvent::kKvFrame);
    EXPECT_TRUE(Eventually([&] { return engine_->stopped() == 1; }));
    clock_.Advance(absl::Seconds(25));
    engine_->HoldAfter(-1);
    for (const auto& call : pair) EXPECT_EQ(call->Rest().result()->batch_prompts(), 2);
    EXPECT_TRUE(EverythingIsFree());
  }
  const size_t before = engine_->lengths().size();
  const auto holder = HoldEngine();
  OpenStream hasty(*NewStub(), DensePromptOf(1000), absl::Now() + absl::Seconds(12.5));
  hasty.ReadUntil(v1::PrefillEvent::kAccepted);
  // At the best recent speed 3900 tokens take 24.4 seconds, and 1100 take 6.9.
  const auto large = Submit(DensePromptOf(2900)), small = Submit(DensePromptOf(100));
  engine_->HoldAfter(-1);
  for (OpenStream* call : {&hasty, large.get(), small.get()}) {
    EXPECT_NE(call->Rest().result(), nullptr);
  }
  const auto lengths = engine_->lengths();
  ASSERT_EQ(lengths.size(), before + 3);
  EXPECT_THAT(lengths[before + 1], ElementsAre(1000, 100));
  EXPECT_THAT(lengths[before + 2], ElementsAre(2900));
}

TEST_F(Batch, EndsAltogetherWhenTheDeviceFails) {
  StartServer();
  const Calls calls = RunTogether({10, 20, 30}, /*layers=*/1);
  engine_->FailFrom(1, absl::InternalError("an illegal memory access"));
  engine_->HoldAfter(-1);
  for (const auto& call : calls) {
    const grpc::Status status = call->Rest().status;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_THAT(status.error_message(), HasSubstr("an illegal memory access"));
  }
  EXPECT_FALSE(server_->failure().ok());
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Batch, EndsAltogetherWhenPackingFails) {
  StartServer();
  engine_->FailPacking(absl::InternalError("copy failed"));
  const Calls calls = RunTogether({10, 20, 30});
  for (const auto& call : calls) {
    EXPECT_EQ(call->Rest().status.error_code(), grpc::StatusCode::UNAVAILABLE);
  }
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Batch, GivesLogProbabilitiesToThoseThatAsk) {
  StartServer();
  const auto holder = HoldEngine();
  Calls calls;
  for (const int length : {7, 8, 9}) {
    v1::PrefillRequest request = PromptOf(length);
    request.set_prompt_logprobs(length != 8);
    calls.push_back(Submit(request));
  }
  engine_->HoldAfter(-1);
  for (const auto& [i, num_logprobs] : {std::pair(0, 6), {1, 0}, {2, 8}}) {
    const StreamContents contents = calls[i]->Rest();
    ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
    EXPECT_EQ(contents.result()->batch_prompts(), 3);
    EXPECT_EQ(contents.result()->prompt_logprobs_size(), num_logprobs);
  }
}

TEST_F(Batch, ThatTheEngineRefusesIsComputedOneByOne) {
  StartServer();
  engine_->set_refuses_batches(true);
  const auto holder = HoldEngine();
  const auto first = Submit(PromptOf(10)), second = Submit(PromptOf(20));
  engine_->HoldAfter(-1);
  EXPECT_NE(first->Rest().result(), nullptr);
  EXPECT_NE(second->Rest().result(), nullptr);
  EXPECT_THAT(engine_->lengths(), ElementsAre(ElementsAre(1001), ElementsAre(10), ElementsAre(20)));
  EXPECT_TRUE(server_->failure().ok());
}

}  // namespace
}  // namespace prefilld::server
