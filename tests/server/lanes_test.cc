// Tests KV over several streams at once.
#include <thread>

#include <gmock/gmock.h>

#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

v1::AttachLaneRequest Lane(const v1::Accepted& accepted, uint32_t lane) {
  v1::AttachLaneRequest request;
  request.set_request_id(accepted.request_id());
  request.set_lane(lane);
  request.set_lane_key(accepted.lane_key());
  return request;
}

class Lanes : public ServerFixture {
 protected:
  v1::PrefillRequest PromptOverLanes(uint32_t num_lanes, int num_tokens = 20'000) {
    v1::PrefillRequest request = PromptOf(num_tokens, "laned");
    request.set_num_lanes(num_lanes);
    return request;
  }
};

TEST_F(Lanes, TogetherBringTheWholeCacheAndAResultThatCountsTheirFrames) {
  StartServer();
  engine_->set_layer_time(absl::Milliseconds(20));
  OpenStream control(*stub_, PromptOverLanes(3));
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  EXPECT_EQ(accepted.num_lanes(), 3);

  StreamContents lane_contents[2];
  std::thread readers[2];
  const auto stub_1 = NewStub(), stub_2 = NewStub();
  readers[0] =
      std::thread([&] { lane_contents[0] = OpenStream(*stub_1, Lane(accepted, 1)).Rest(); });
  readers[1] =
      std::thread([&] { lane_contents[1] = OpenStream(*stub_2, Lane(accepted, 2)).Rest(); });
  const StreamContents rest = control.Rest();
  for (auto& reader : readers) reader.join();

  ASSERT_TRUE(rest.status.ok()) << rest.status.error_message();
  ASSERT_NE(rest.result(), nullptr);
  std::vector<v1::KvFrame> frames = rest.frames();
  ASSERT_EQ(rest.result()->frames_per_lane_size(), 3);
  EXPECT_EQ(rest.result()->frames_per_lane(0), frames.size());
  for (uint32_t lane = 1; lane < 3; ++lane) {
    const StreamContents& contents = lane_contents[lane - 1];
    EXPECT_TRUE(contents.status.ok()) << contents.status.error_message();
    EXPECT_EQ(contents.events.size(), rest.result()->frames_per_lane(lane));
    EXPECT_GT(contents.events.size(), 0);
    for (const v1::KvFrame& frame : contents.frames()) {
      EXPECT_EQ(frame.lane(), lane);
      frames.push_back(frame);
    }
  }
  ExpectWholeCache(frames, accepted.layout());
  EXPECT_GT(Metric("prefilld_kv_bytes_total{lane=\"2\"}"), 0);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Lanes, AShortPromptsResultWaitsForEveryLaneToBeAttached) {
  StartServer();
  OpenStream control(*stub_, PromptOverLanes(2, 10));
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 4; }));
  OpenStream lane(*stub_, Lane(accepted, 1));
  EXPECT_TRUE(lane.Rest().status.ok());
  EXPECT_NE(control.Rest().result(), nullptr);
}

TEST_F(Lanes, NotAttachedInTimeEndTheRequest) {
  StartServer();
  OpenStream control(*stub_, PromptOverLanes(2, 10));
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  clock_.Advance(absl::Seconds(11));
  const grpc::Status status = control.Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("lanes"));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"lanes_missing\"}"), 1);
}

TEST_F(Lanes, AreRefusedWhenUnknownTakenOrOutOfRange) {
  StartServer();
  v1::Accepted nobody;
  nobody.set_request_id("nobody");
  EXPECT_EQ(OpenStream(*stub_, Lane(nobody, 1)).Rest().status.error_code(),
            grpc::StatusCode::NOT_FOUND);
  engine_->HoldAfter(0);
  OpenStream control(*stub_, PromptOverLanes(3, 10));
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  OpenStream lane(*stub_, Lane(accepted, 1));
  lane.WaitUntilAttached();
  EXPECT_EQ(OpenStream(*stub_, Lane(accepted, 1)).Rest().status.error_code(),
            grpc::StatusCode::ALREADY_EXISTS);
  for (const uint32_t number : {0u, 3u, 0xffffffffu}) {
    EXPECT_EQ(OpenStream(*stub_, Lane(accepted, number)).Rest().status.error_code(),
              grpc::StatusCode::INVALID_ARGUMENT);
  }
}

TEST_F(Lanes, OfAStrangerWhoGuessesTheIdAreRefusedAndTheRequestGoesOn) {
  StartServer();
  engine_->HoldAfter(0);
  OpenStream control(*stub_, PromptOverLanes(2, 10));
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  EXPECT_EQ(accepted.lane_key().size(), 32);
  v1::Accepted guessed = accepted;
  for (const char* key : {"", "0", "00000000000000000000000000000000"}) {
    guessed.set_lane_key(key);
    EXPECT_EQ(OpenStream(*NewStub(), Lane(guessed, 1)).Rest().status.error_code(),
              grpc::StatusCode::PERMISSION_DENIED);
  }
  OpenStream lane(*stub_, Lane(accepted, 1));
  lane.WaitUntilAttached();
  engine_->HoldAfter(-1);
  std::thread reader([&] { EXPECT_TRUE(lane.Rest().status.ok()); });
  EXPECT_NE(control.Rest().result(), nullptr);
  reader.join();

  OpenStream other(*stub_, PromptOverLanes(2, 10));
  EXPECT_NE(other.ReadUntil(v1::PrefillEvent::kAccepted).accepted().lane_key(),
            accepted.lane_key());
}

TEST_F(Lanes, ThatBreakEndTheRequest) {
  StartServer();
  engine_->HoldAfter(0);
  OpenStream control(*stub_, PromptOverLanes(2));
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  {
    const auto stub = NewStub();
    OpenStream lane(*stub, Lane(accepted, 1));
    lane.WaitUntilAttached();
    engine_->HoldAfter(1);
    lane.ReadUntil(v1::PrefillEvent::kKvFrame);
  }
  EXPECT_EQ(control.Rest().status.error_code(), grpc::StatusCode::CANCELLED);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->layers_run(), 2);
}

TEST_F(Lanes, AStalledOneEndsTheRequestThoughTheOthersFlow) {
  StartServer();
  engine_->set_layer_time(absl::Milliseconds(10));
  OpenStream control(*stub_, PromptOverLanes(2, 40'000));
  const v1::Accepted accepted = control.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  const auto stub = NewStub();
  OpenStream never_read(*stub, Lane(accepted, 1));
  StreamContents rest;
  std::thread reader([&] { rest = control.Rest(); });
  // The request's share of staging fills up, and its consumer takes no more.
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") == 4 << 20; }));
  EXPECT_TRUE(PassStallTimeoutsUntil([&] { return Metric("prefilld_live_requests") == 0; }));
  reader.join();
  EXPECT_EQ(rest.status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_TRUE(EverythingIsFree());
}

}  // namespace
}  // namespace prefilld::server
