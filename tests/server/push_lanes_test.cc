// Tests KV pushed on lanes, to receivers that acknowledge it.
#include <functional>
#include <map>
#include <set>
#include <utility>

#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "tests/server/lane_receiver.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

using Answer = LaneReceiver::Answer;

class PushLanes : public ServerFixture {
 protected:
  PushLanes() {
    options_.deliver_to_allow = {"127.0.0.1:*"};
    options_.frame_bytes = 256 << 10;
  }

  static v1::PrefillRequest PromptTo(const LaneReceiver& receiver, int num_tokens,
                                     uint32_t num_lanes) {
    v1::PrefillRequest request = PromptOf(num_tokens, "pushed");
    request.set_num_lanes(num_lanes);
    request.mutable_deliver_to()->set_address(receiver.address());
    request.mutable_deliver_to()->set_transfer_id("transfer-7");
    return request;
  }

  void ExpectWhole(LaneReceiver& receiver, const StreamContents& contents, size_t num_lanes) {
    ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
    ASSERT_NE(contents.result(), nullptr);
    ASSERT_TRUE(receiver.result().has_value());
    EXPECT_EQ(receiver.result()->first_token().token_id(), 250);
    EXPECT_EQ(receiver.result()->kv_frames(), receiver.frames().size());
    EXPECT_THAT(receiver.result()->frames_per_lane(), SizeIs(num_lanes));
    ExpectWholeCache(receiver.frames(), contents.events.front().accepted().layout());
    EXPECT_EQ(engine_->layers_run(), 4);
    EXPECT_TRUE(EverythingIsFree());
    EXPECT_TRUE(Eventually([&] { return receiver.running == 0; }));
  }
  void PassStallTimeouts() {
    EXPECT_TRUE(Eventually([&] {
      clock_.Advance(options_.stall_timeout + absl::Seconds(1));
      absl::SleepFor(absl::Milliseconds(100));
      return Metric("prefilld_live_requests") == 0;
    }));
  }
  double Ended(const std::string& outcome) const {
    return Metric("prefilld_requests_total{outcome=\"" + outcome + "\"}");
  }
};

TEST_F(PushLanes, ComeOnConnectionsOfTheirOwnAndShowOneKey) {
  StartServer();
  LaneReceiver receiver;
  const StreamContents contents = Prefill(PromptTo(receiver, 5000, 3));
  ExpectWhole(receiver, contents, 3);
  // The caller has nothing to attach.
  EXPECT_EQ(contents.events.front().accepted().num_lanes(), 1);
  EXPECT_EQ(contents.events.front().accepted().lane_key(), "");
  EXPECT_EQ(contents.events.front().accepted().resume_window_ms(), 0);
  std::set<uint32_t> lanes;
  for (const v1::ReceiveOpen& open : receiver.opens()) {
    EXPECT_TRUE(lanes.insert(open.lane()).second);
    EXPECT_EQ(open.num_lanes(), 3);
    EXPECT_EQ(open.transfer_id(), "transfer-7");
    EXPECT_GE(open.transfer_key().size(), 32);
    EXPECT_EQ(open.transfer_key(), receiver.opens().front().transfer_key());
  }
  EXPECT_EQ(lanes, (std::set<uint32_t>{0, 1, 2}));
  EXPECT_EQ(Metric("prefilld_resumed_streams_total"), 0);
  EXPECT_EQ(Metric("prefilld_plain_pushes_total"), 0);
}

TEST_F(PushLanes, AreChosenByTheSizeOfTheKv) {
  StartServer();
  LaneReceiver small, large;
  ExpectWhole(small, Prefill(PromptTo(small, 1000, 0)), 1);
  EXPECT_TRUE(Prefill(PromptTo(large, 5000, 0)).status.ok());
  EXPECT_EQ(large.opens().back().num_lanes(), 4);
}

TEST_F(PushLanes, AreAtMostThoseOfTheServer) {
  StartServer();
  LaneReceiver receiver;
  const grpc::Status status = Prefill(PromptTo(receiver, 100, 17)).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("num_lanes 17; at most 16"));
  v1::PrefillRequest several = PromptOf(100);
  *several.add_pushes()->mutable_deliver_to() = PromptTo(receiver, 1, 0).deliver_to();
  several.mutable_pushes(0)->set_num_lanes(17);
  EXPECT_THAT(Prefill(several).status.error_message(), HasSubstr("pushes[0].num_lanes 17"));
}

class BrokenPushLanes : public PushLanes, public ::testing::WithParamInterface<uint32_t> {};

// Every third frame is lost with its stream, the first time that it comes.
TEST_P(BrokenPushLanes, GoOnWhereTheReceiverSays) {
  StartServer();
  absl::Mutex mu;
  std::set<std::pair<uint32_t, uint64_t>> lost;
  LaneReceiver receiver([&](const v1::KvFrame& frame) {
    absl::MutexLock lock(&mu);
    const bool is_lost =
        frame.sequence() % 3 == 1 && lost.insert({frame.lane(), frame.sequence()}).second;
    return is_lost ? Answer::kBreak : Answer::kTake;
  });
  ExpectWhole(receiver, Prefill(PromptTo(receiver, 5000, GetParam())), GetParam());
  EXPECT_GE(lost.size(), 8);
  EXPECT_EQ(receiver.opens().size(), GetParam() + lost.size());
  EXPECT_EQ(Metric("prefilld_resumed_streams_total"), static_cast<double>(lost.size()));
  EXPECT_GE(Metric("prefilld_kv_frames_resent_total{cause=\"resumed\"}"),
            static_cast<double>(lost.size()));
}

INSTANTIATE_TEST_SUITE_P(Lanes, BrokenPushLanes, ::testing::Values(1, 4));

TEST_F(PushLanes, ABrokenOpeningIsNoRefusal) {
  StartServer();
  LaneReceiver receiver([](const v1::KvFrame&) { return Answer::kTake; },
                        [](const v1::ReceiveOpen&, int opened_before) {
                          return opened_before % 2 == 0
                                     ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "it broke")
                                     : grpc::Status::OK;
                        });
  ExpectWhole(receiver, Prefill(PromptTo(receiver, 5000, 2)), 2);
}

TEST_F(PushLanes, SendDamagedFramesAgainAndNoOthers) {
  StartServer();
  absl::Mutex mu;
  std::set<std::pair<uint32_t, uint64_t>> damaged;
  LaneReceiver receiver([&](const v1::KvFrame& frame) {
    absl::MutexLock lock(&mu);
    const bool is_damaged =
        frame.sequence() % 4 == 1 && damaged.insert({frame.lane(), frame.sequence()}).second;
    return is_damaged ? Answer::kDamaged : Answer::kTake;
  });
  ExpectWhole(receiver, Prefill(PromptTo(receiver, 5000, 2)), 2);
  EXPECT_GE(damaged.size(), 8);
  EXPECT_EQ(receiver.arrivals, receiver.frames().size() + damaged.size());
  EXPECT_EQ(Metric("prefilld_kv_frames_resent_total{cause=\"damaged\"}"),
            static_cast<double>(damaged.size()));
  EXPECT_EQ(Metric("prefilld_resumed_streams_total"), 0);
}

TEST_F(PushLanes, EndWhenAFrameIsDamagedAgainAndAgain) {
  StartServer();
  LaneReceiver receiver([](const v1::KvFrame& frame) {
    return frame.sequence() == 2 ? Answer::kDamaged : Answer::kTake;
  });
  const StreamContents contents = Prefill(PromptTo(receiver, 2000, 1));
  EXPECT_EQ(contents.status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(contents.status.error_message(), HasSubstr("copies of frame 2; at most 16"));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("damaged"), 1);
}

TEST_F(PushLanes, ToAReceiverThatAcknowledgesNothingAreCutOff) {
  StartServer();
  LaneReceiver receiver([](const v1::KvFrame&) { return Answer::kSilence; });
  OpenStream call(*stub_, PromptTo(receiver, 5000, 2));
  EXPECT_TRUE(Eventually([&] { return receiver.arrivals > 4; }));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_kv_frames_retained") > 0; }));
  PassStallTimeouts();
  EXPECT_EQ(call.Rest().status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("stalled"), 1);
  EXPECT_TRUE(Eventually([&] { return receiver.running == 0; }));
}

TEST_F(PushLanes, ToAReceiverThatDoesNotAnswerTheOpeningAreCutOff) {
  StartServer();
  LaneReceiver receiver;
  receiver.answers_opening = false;
  OpenStream call(*stub_, PromptTo(receiver, 5000, 2));
  EXPECT_TRUE(Eventually([&] { return receiver.running == 1; }));
  PassStallTimeouts();
  EXPECT_EQ(call.Rest().status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(receiver.arrivals, 0);
  EXPECT_TRUE(Eventually([&] { return receiver.running == 0; }));
}

// A receiver that was started anew knows nothing of the transfer.
TEST_F(PushLanes, ToAReceiverThatHasForgottenThemEndWithItsStatus) {
  StartServer();
  LaneReceiver receiver(
      [](const v1::KvFrame& frame) {
        return frame.sequence() < 3 ? Answer::kTake : Answer::kBreak;
      },
      [](const v1::ReceiveOpen&, int opened_before) {
        return opened_before == 0
                   ? grpc::Status::OK
                   : grpc::Status(grpc::StatusCode::NOT_FOUND, "nobody waits for it");
      });
  const StreamContents contents = Prefill(PromptTo(receiver, 5000, 1));
  EXPECT_EQ(contents.status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(contents.status.error_message(), HasSubstr("nobody waits for it"));
  EXPECT_THAT(contents.status.error_message(), HasSubstr(receiver.address()));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("receiver_failed"), 1);
}

TEST_F(PushLanes, WaitForTheirReceiverAsLongAsTheWindow) {
  StartServer();
  engine_->HoldAfter(2);
  LaneReceiver receiver;
  OpenStream call(*stub_, PromptTo(receiver, 5000, 2));
  EXPECT_TRUE(Eventually([&] { return receiver.frames().size() > 10; }));
  receiver.Stop();
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_waiting_for_consumer") == 1; }));
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_EQ(Metric("prefilld_live_requests"), 1);
  clock_.Advance(options_.resume_window + absl::Seconds(1));
  const grpc::Status status = call.Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr(receiver.address()));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("receiver_failed"), 1);
}

TEST_F(PushLanes, OfACallerWhoCancelsAreNotOpenedAgain) {
  StartServer();
  engine_->HoldAfter(2);
  LaneReceiver receiver;
  OpenStream call(*stub_, PromptTo(receiver, 5000, 2));
  EXPECT_TRUE(Eventually([&] { return receiver.frames().size() > 10; }));
  receiver.Stop();
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_waiting_for_consumer") == 1; }));
  call.Cancel();
  EXPECT_TRUE(Eventually([&] { return Ended("cancelled") == 1; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(PushLanes, EndWithTheirConnectionWhereTheOperatorWantsNoWindow) {
  options_.resume_window = absl::ZeroDuration();
  StartServer();
  LaneReceiver receiver([](const v1::KvFrame& frame) {
    return frame.sequence() < 3 ? Answer::kTake : Answer::kBreak;
  });
  const StreamContents contents = Prefill(PromptTo(receiver, 5000, 2));
  EXPECT_EQ(contents.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(contents.status.error_message(), HasSubstr("it broke"));
  EXPECT_TRUE(EverythingIsFree());
  LaneReceiver whole;
  EXPECT_TRUE(Prefill(PromptTo(whole, 5000, 2)).status.ok());
}

TEST_F(PushLanes, OfSeveralReceiversBreakEachForItself) {
  options_.staging_bytes = 64 << 20;  // two that are away at once may hold half of it
  StartServer();
  const auto script = [](const v1::KvFrame& frame) {
    return frame.sequence() == 2 ? Answer::kBreak : Answer::kTake;
  };
  std::atomic<int> breaks = 0;
  LaneReceiver reliable;
  LaneReceiver breaking([&](const v1::KvFrame& frame) {
    return frame.sequence() == 2 && ++breaks < 4 ? Answer::kBreak : Answer::kTake;
  });
  LaneReceiver hopeless(script, [](const v1::ReceiveOpen&, int opened_before) {
    return opened_before < 2 ? grpc::Status::OK
                             : grpc::Status(grpc::StatusCode::NOT_FOUND, "nobody waits for it");
  });
  v1::PrefillRequest request = PromptOf(5000, "pushed");
  for (LaneReceiver* const receiver : {&reliable, &breaking, &hopeless}) {
    v1::Push& push = *request.add_pushes();
    *push.mutable_deliver_to() = PromptTo(*receiver, 1, 0).deliver_to();
    push.set_num_lanes(2);
  }
  const StreamContents contents = Prefill(request);
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  ASSERT_EQ(contents.result()->pushes_size(), 3);
  EXPECT_EQ(contents.result()->pushes(0).code(), 0);
  EXPECT_EQ(contents.result()->pushes(1).code(), 0);
  EXPECT_EQ(contents.result()->pushes(2).code(), grpc::StatusCode::NOT_FOUND)
      << contents.result()->pushes(2).message();
  for (LaneReceiver* const receiver : {&reliable, &breaking}) {
    ExpectWholeCache(receiver->frames(), receiver->opens().front().layout());
  }
  EXPECT_EQ(engine_->layers_run(), 4);
  EXPECT_TRUE(EverythingIsFree());
}

}  // namespace
}  // namespace prefilld::server
