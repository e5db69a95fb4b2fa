// Tests several receivers of one computation.
#include <thread>
#include <utility>
#include <vector>

#include <gmock/gmock.h>

#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

constexpr char kKey[] = "0123456789abcdef0123456789abcdef";
constexpr int kTokens = 20'000;

// The KV of a layer is more than a receiver's share of the staging memory and its sockets hold.
constexpr int kLargePrompt = 40'000;
constexpr int kFirstCallFrames = 10;  // a layer of it: 10.24 MB
constexpr int kReceiverFrames = 20;   // 20.48 MB, because its elements are larger

// The fake engine's model has two KV heads: the first call takes head 0, and receiver 1 head 1.
v1::PrefillRequest FirstCall(int num_tokens = kTokens, uint32_t num_receivers = 2) {
  v1::PrefillRequest request = PromptOf(num_tokens, "shared");
  request.set_num_receivers(num_receivers);
  request.set_receiver_key(kKey);
  request.mutable_layout()->set_num_heads(1);
  return request;
}

v1::AttachReceiverRequest Receiver(uint32_t number = 1, int num_tokens = kTokens) {
  v1::AttachReceiverRequest request;
  request.set_request_id("shared");
  request.set_receiver_key(kKey);
  request.set_receiver(number);
  request.set_num_tokens(static_cast<uint32_t>(num_tokens));
  request.mutable_layout()->set_first_head(1);
  request.mutable_layout()->set_num_heads(1);
  request.mutable_layout()->set_order(v1::KV_ORDER_HN2D);
  request.mutable_layout()->set_block_tokens(64);
  request.mutable_layout()->set_dtype(v1::DTYPE_FP32);
  return request;
}

class Receivers : public ServerFixture {
 protected:
  template <typename Request>
  std::unique_ptr<ReadCall> Read(const Request& request) {
    return std::make_unique<ReadCall>(NewStub(), request);
  }
  // Waits until every slot holds a layer of kLargePrompt for a receiver that reads nothing, its
  // share of the staging memory is full, and the one that reads has taken all frames of these
  // layers. Then nothing is under way.
  void AwaitStandstill(const ReadCall& reads, int frames_of_a_layer) {
    EXPECT_TRUE(Eventually([&] {
      return engine_->held() == engine_options_.kv_slots &&
             reads.frames_so_far() == frames_of_a_layer * engine_->layers_run();
    }));
    EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") == 4 << 20; }));
  }
  // Checks that a receiver got everything, and that a result counts it.
  static void ExpectWhole(const StreamContents& contents) {
    ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
    ASSERT_TRUE(contents.events.front().has_accepted());
    ExpectWholeCache(contents.frames(), contents.events.front().accepted().layout());
    ASSERT_NE(contents.result(), nullptr);
    EXPECT_EQ(contents.result()->kv_frames(), contents.frames().size());
    uint64_t bytes = 0;
    for (const v1::KvFrame& frame : contents.frames()) bytes += frame.payload().size();
    EXPECT_EQ(contents.result()->kv_bytes(), bytes);
  }
  double ReceiversThatEnded(const std::string& outcome) const {
    return Metric("prefilld_receivers_total{outcome=\"" + outcome + "\"}");
  }
  double RequestsThatEnded(const std::string& outcome) const {
    return Metric("prefilld_requests_total{outcome=\"" + outcome + "\"}");
  }
};

TEST_F(Receivers, EachTakeTheirHeadsOfOneComputation) {
  StartServer();
  engine_->set_layer_time(absl::Milliseconds(10));
  const auto first = Read(FirstCall());
  const auto other = Read(Receiver());
  ExpectWhole(first->Contents());
  ExpectWhole(other->Contents());
  const v1::Accepted& mine = first->Contents().events.front().accepted();
  EXPECT_EQ(mine.receiver_key(), kKey);
  EXPECT_EQ(mine.receiver(), 0);
  const v1::Accepted& theirs = other->Contents().events.front().accepted();
  EXPECT_EQ(theirs.request_id(), "shared");
  EXPECT_EQ(theirs.receiver_key(), "");
  EXPECT_EQ(theirs.receiver(), 1);
  EXPECT_EQ(theirs.layout().first_head(), 1);
  EXPECT_EQ(theirs.layout().num_heads(), 1);
  EXPECT_EQ(theirs.layout().order(), v1::KV_ORDER_HN2D);
  const v1::PrefillResult& result = *other->Contents().result();
  EXPECT_EQ(result.first_token().token_id(), first->Contents().result()->first_token().token_id());
  EXPECT_EQ(result.num_tokens(), kTokens);
  EXPECT_EQ(result.total().dense_heads(), first->Contents().result()->total().dense_heads());
  EXPECT_TRUE(EverythingIsFree());
  // The prompt was computed and counted once.
  EXPECT_EQ(engine_->layers_run(), 4);
  EXPECT_EQ(Metric("prefilld_steps_total"), 4);
  EXPECT_EQ(Metric("prefilld_prompt_tokens_count"), 1);
  EXPECT_EQ(RequestsThatEnded("ok"), 1);
  EXPECT_EQ(ReceiversThatEnded("ok"), 1);
}

TEST_F(Receivers, EachMayHaveATypeOfItsOwn) {
  StartServer();
  const auto first = Read(FirstCall(kTokens, 3));
  v1::AttachReceiverRequest per_token = Receiver(1), per_block = Receiver(2);
  for (v1::AttachReceiverRequest* request : {&per_token, &per_block}) {
    request->mutable_layout()->set_dtype(v1::DTYPE_FP8_E4M3);
  }
  per_block.mutable_layout()->set_scales(v1::KV_SCALES_PER_BLOCK);
  const auto second = Read(per_token), third = Read(per_block);
  ExpectWhole(first->Contents());
  ExpectWhole(second->Contents());
  ExpectWhole(third->Contents());
  EXPECT_GT(first->Contents().result()->kv_bytes(), second->Contents().result()->kv_bytes());
  EXPECT_GT(second->Contents().result()->kv_bytes(), third->Contents().result()->kv_bytes());
}

TEST_F(Receivers, MayCallBeforeTheFirstCall) {
  StartServer();
  const auto other = Read(Receiver());
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(engine_->started(), 0);
  const auto first = Read(FirstCall());
  ExpectWhole(first->Contents());
  ExpectWhole(other->Contents());
}

TEST_F(Receivers, ThatComeLateFindEveryLayer) {
  StartServer();
  const auto first = Read(FirstCall());
  // No layer is given up while somebody is awaited, and no more are computed than there are slots.
  EXPECT_TRUE(Eventually([&] { return engine_->held() == engine_options_.kv_slots; }));
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(engine_->layers_run(), engine_options_.kv_slots);
  const auto other = Read(Receiver());
  ExpectWhole(first->Contents());
  ExpectWhole(other->Contents());
  EXPECT_TRUE(EverythingIsFree());
}

// All layers of this prompt are computed and sent to the first call before the other one comes.
TEST_F(Receivers, AreAwaitedByAResultToo) {
  engine_options_.kv_slots = 5;
  StartServer();
  const auto first = Read(FirstCall(10));
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 4; }));
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(engine_->held(), 4);
  const auto other = Read(Receiver(1, 10));
  ExpectWhole(first->Contents());
  ExpectWhole(other->Contents());
}

TEST_F(Receivers, ThatDoNotComeAreLeftBehind) {
  StartServer();
  const auto first = Read(FirstCall(kTokens, 3));
  const auto second = Read(Receiver(1));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_live_requests") == 2; }));
  EXPECT_TRUE(Eventually([&] { return engine_->held() == engine_options_.kv_slots; }));
  clock_.Advance(absl::Seconds(11));
  ExpectWhole(first->Contents());
  ExpectWhole(second->Contents());
  EXPECT_EQ(engine_->layers_run(), 4);
  EXPECT_TRUE(EverythingIsFree());
  // The third waits for a request of that id in vain.
  const auto third = Read(Receiver(2));
  EXPECT_TRUE(Eventually([&] {
    clock_.Advance(absl::Seconds(11));  // again, until it has begun to wait
    return ReceiversThatEnded("invalid") == 1;
  }));
  EXPECT_EQ(third->Contents().status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(Receivers, ThatComeTooLateAreRefusedWhileTheOthersGoOn) {
  StartServer();
  engine_->HoldAfter(2);
  const auto first = Read(FirstCall());
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 2; }));
  clock_.Advance(absl::Seconds(11));
  EXPECT_TRUE(Eventually([&] { return engine_->held() == 0; }));
  const auto late = Read(Receiver());
  EXPECT_EQ(late->Contents().status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(late->Contents().status.error_message(), HasSubstr("awaits no more receivers"));
  engine_->HoldAfter(-1);
  ExpectWhole(first->Contents());
}

TEST_F(Receivers, OneThatTakesNothingEndsAlone) {
  StartServer();
  engine_->set_layer_time(absl::Milliseconds(10));
  const auto stub = NewStub();
  OpenStream never_read(*stub, Receiver(1, kLargePrompt));
  const auto first = Read(FirstCall(kLargePrompt));
  AwaitStandstill(*first, kFirstCallFrames);
  EXPECT_LT(engine_->layers_run(), 4);
  EXPECT_TRUE(PassStallTimeoutsUntil([&] { return ReceiversThatEnded("stalled") == 1; }));
  ExpectWhole(first->Contents());
  const grpc::Status status = never_read.Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("took nothing"));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(ReceiversThatEnded("stalled"), 1);
  EXPECT_EQ(RequestsThatEnded("ok"), 1);
}

TEST_F(Receivers, GoOnWhenTheFirstCallTakesNothing) {
  StartServer();
  engine_->set_layer_time(absl::Milliseconds(10));
  const auto stub = NewStub();
  OpenStream never_read(*stub, FirstCall(kLargePrompt));
  const auto other = Read(Receiver(1, kLargePrompt));
  AwaitStandstill(*other, kReceiverFrames);
  EXPECT_TRUE(PassStallTimeoutsUntil([&] { return RequestsThatEnded("stalled") == 1; }));
  ExpectWhole(other->Contents());
  EXPECT_EQ(never_read.Rest().status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(engine_->layers_run(), 4);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(RequestsThatEnded("stalled"), 1);
  EXPECT_EQ(ReceiversThatEnded("ok"), 1);
}

TEST_F(Receivers, OneThatIsCancelledEndsAlone) {
  StartServer();
  engine_->HoldAfter(2);
  const auto first = Read(FirstCall());
  {
    const auto stub = NewStub();
    OpenStream leaves(*stub, Receiver());
    leaves.ReadUntil(v1::PrefillEvent::kKvFrame);
  }
  EXPECT_TRUE(Eventually([&] { return ReceiversThatEnded("cancelled") == 1; }));
  engine_->HoldAfter(-1);
  ExpectWhole(first->Contents());
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Receivers, AllEndWhenTheFirstCallIsCancelled) {
  StartServer();
  engine_->HoldAfter(2);
  const auto first = Read(FirstCall());
  const auto other = Read(Receiver());
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 2; }));
  EXPECT_TRUE(Eventually([&] { return engine_->held() == 0; }));
  first->Cancel();
  EXPECT_EQ(other->Contents().status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(other->Contents().status.error_message(),
              HasSubstr("first call has ended: cancelled after layer 2 of 4"));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(RequestsThatEnded("cancelled"), 1);
  EXPECT_EQ(ReceiversThatEnded("cancelled"), 1);
}

TEST_F(Receivers, WhoseDeadlinePassesEndAlone) {
  StartServer();
  engine_->HoldAfter(2);
  const auto first = Read(FirstCall());
  OpenStream hurried(*stub_, Receiver(), absl::Now() + absl::Milliseconds(300));
  EXPECT_EQ(hurried.Rest().status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  engine_->HoldAfter(-1);
  ExpectWhole(first->Contents());
  EXPECT_TRUE(Eventually([&] { return ReceiversThatEnded("deadline") == 1; }));
}

TEST_F(Receivers, HaveLanesOfTheirOwn) {
  StartServer();
  engine_->set_layer_time(absl::Milliseconds(20));
  const auto first = Read(FirstCall());
  v1::AttachReceiverRequest request = Receiver();
  request.set_num_lanes(2);
  const auto stub = NewStub();
  OpenStream control(*stub, request);
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  v1::AttachLaneRequest lane;
  lane.set_request_id(accepted.request_id());
  lane.set_receiver(accepted.receiver());
  lane.set_lane(1);
  lane.set_lane_key("0");
  EXPECT_EQ(OpenStream(*stub_, lane).Rest().status.error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
  lane.set_lane_key(accepted.lane_key());
  const auto side = Read(lane);
  StreamContents rest = control.Rest();
  ASSERT_TRUE(rest.status.ok()) << rest.status.error_message();
  std::vector<v1::KvFrame> frames = rest.frames();
  for (const v1::KvFrame& frame : side->Contents().frames()) frames.push_back(frame);
  EXPECT_GT(side->Contents().frames().size(), 0);
  ExpectWholeCache(frames, accepted.layout());
  ExpectWhole(first->Contents());
}

TEST_F(Receivers, AreRefusedWithoutTheKeyTwiceOrAsUnknown) {
  StartServer();
  engine_->HoldAfter(1);
  const auto first = Read(FirstCall());
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 1; }));
  const auto refused = [&](v1::AttachReceiverRequest request) {
    return OpenStream(*stub_, request).Rest().status;
  };
  v1::AttachReceiverRequest request = Receiver();
  for (const char* key : {"", "0", "0123456789abcdef0123456789abcdee"}) {
    request.set_receiver_key(key);
    EXPECT_EQ(refused(request).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  }
  EXPECT_THAT(refused(Receiver(2)).error_message(), HasSubstr("receiver 2; the request has 1"));
  EXPECT_THAT(refused(Receiver(1, 5)).error_message(), HasSubstr("num_tokens 5"));
  const auto other = Read(Receiver());
  EXPECT_TRUE(Eventually([&] { return engine_->held() == 0; }));
  EXPECT_EQ(refused(Receiver()).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  engine_->HoldAfter(-1);
  ExpectWhole(first->Contents());
  ExpectWhole(other->Contents());
  EXPECT_TRUE(Eventually([&] { return ReceiversThatEnded("invalid") == 6; }));
}

TEST_F(Receivers, AreRefusedWhenTheRequestHasNoOthers) {
  StartServer();
  engine_->HoldAfter(0);
  OpenStream alone(*stub_, PromptOf(kTokens, "shared"));
  alone.ReadUntil(v1::PrefillEvent::kAccepted);
  EXPECT_EQ(OpenStream(*stub_, Receiver()).Rest().status.error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
}

TEST_F(Receivers, AreRefusedForFieldsOutOfRange) {
  StartServer();
  const auto expect = [&](auto change, const std::vector<const char*>& words) {
    v1::AttachReceiverRequest request = Receiver();
    change(request);
    const grpc::Status status = OpenStream(*stub_, request).Rest().status;
    EXPECT_NE(status.error_code(), grpc::StatusCode::OK);
    for (const char* word : words) EXPECT_THAT(status.error_message(), HasSubstr(word));
  };
  expect([](auto& r) { r.clear_request_id(); }, {"request_id", "empty"});
  expect([](auto& r) { r.set_request_id(std::string(129, 'x')); }, {"request_id", "129"});
  expect([](auto& r) { r.set_receiver_key(std::string(129, 'x')); }, {"receiver_key", "129"});
  expect([](auto& r) { r.set_receiver(0); }, {"receiver 0", "from 1 to 15"});
  expect([](auto& r) { r.set_receiver(16); }, {"receiver 16", "from 1 to 15"});
  expect([](auto& r) { r.set_num_tokens(0); }, {"num_tokens 0", "from 1"});
  expect([](auto& r) { r.set_num_tokens(0xffffffff); }, {"num_tokens 4294967295"});
  expect([](auto& r) { r.set_num_lanes(17); }, {"num_lanes 17", "16"});
  expect([](auto& r) { r.set_model_fingerprint("feed"); }, {"model_fingerprint feed"});
  expect([](auto& r) { r.mutable_layout()->set_first_head(2); }, {"layout.first_head 2"});
  expect([](auto& r) { r.mutable_layout()->set_block_tokens(17); }, {"layout.block_tokens 17"});
  EXPECT_TRUE(Eventually([&] { return ReceiversThatEnded("invalid") == 11; }));
}

TEST_F(Receivers, ThatWaitLearnWhyTheFirstCallWasRefused) {
  StartServer();
  const auto waits = Read(Receiver());
  v1::AttachReceiverRequest request = Receiver();
  request.set_receiver_key("another key, of another request, 32");
  const auto of_another = Read(request);
  absl::SleepFor(absl::Milliseconds(100));
  v1::PrefillRequest bad = FirstCall();
  bad.mutable_sampling()->set_temperature(-1);
  EXPECT_EQ(Prefill(bad).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(waits->Contents().status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(waits->Contents().status.error_message(), HasSubstr("temperature"));
  of_another->Cancel();
  EXPECT_EQ(of_another->Contents().status.error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(Receivers, MayUseAnIdAgain) {
  StartServer();
  for (int i = 0; i < 3; ++i) {
    const auto other = Read(Receiver());
    const auto first = Read(FirstCall());
    ExpectWhole(first->Contents());
    ExpectWhole(other->Contents());
  }
  EXPECT_EQ(engine_->started(), 3);
}

TEST_F(Receivers, GetAKeyFromTheServerIfTheCallerHasNone) {
  StartServer();
  engine_->HoldAfter(0);
  v1::PrefillRequest request = FirstCall();
  request.clear_receiver_key();
  OpenStream first(*stub_, request);
  const std::string key = first.ReadUntil(v1::PrefillEvent::kAccepted).accepted().receiver_key();
  EXPECT_EQ(key.size(), 32);
  v1::AttachReceiverRequest attach = Receiver();
  attach.set_receiver_key(key);
  const auto other = Read(attach);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(first.Rest().status.ok());
  ExpectWhole(other->Contents());
}

TEST_F(Receivers, WaitInBoundedNumbers) {
  options_.queue_capacity = 200;
  StartServer();
  std::vector<std::unique_ptr<OpenStream>> waiting;
  for (int i = 0; i < 256; ++i) {
    v1::AttachReceiverRequest request = Receiver();
    request.set_request_id("request " + std::to_string(i));
    waiting.push_back(std::make_unique<OpenStream>(*stub_, request));
  }
  // Those before may still be on their way.
  grpc::Status status;
  EXPECT_TRUE(Eventually([&] {
    OpenStream one_more(*stub_, Receiver(), absl::Now() + absl::Milliseconds(200));
    status = one_more.Rest().status;
    return status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
  })) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("256"));
  waiting.clear();
  EXPECT_TRUE(Eventually([&] { return ReceiversThatEnded("cancelled") >= 200; }));
  EXPECT_EQ(OpenStream(*stub_, Receiver(), absl::Now() + absl::Milliseconds(200))
                .Rest()
                .status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED)
      << "there is room again";
}

TEST_F(Receivers, OfRequestsThatWillNotComeAreRefusedInADrain) {
  StartServer();
  const auto other = Read(Receiver());
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_TRUE(server_->Drain(absl::Seconds(10)));
  EXPECT_EQ(other->Contents().status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

// The drain ends when the last receiver has its result.
TEST_F(Receivers, AreWaitedForByADrain) {
  StartServer();
  engine_->HoldAfter(2);
  const auto first = Read(FirstCall()), other = Read(Receiver());
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 2 && engine_->held() == 0; }));
  std::thread drain([&] { EXPECT_TRUE(server_->Drain(absl::Seconds(20))); });
  engine_->HoldAfter(-1);
  ExpectWhole(first->Contents());
  ExpectWhole(other->Contents());
  drain.join();
}

}  // namespace
}  // namespace prefilld::server
