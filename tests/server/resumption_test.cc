// Tests requests that outlive their connections, over sockets.
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/server/resumption_fixture.h"

namespace prefilld::server {
namespace {

TEST_F(Resumption, ACutStreamIsCompletedByAnotherAndNothingIsComputedAgain) {
  StartServer();
  std::vector<v1::KvFrame> frames;
  v1::KvLayout layout;
  {
    OpenStream stream(*NewStub(), Resumable(20'000));
    const v1::Accepted accepted = stream.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
    EXPECT_EQ(accepted.resume_window_ms(), 10'000);
    layout = accepted.layout();
    for (int i = 0; i < 2; ++i) {
      frames.push_back(stream.ReadUntil(v1::PrefillEvent::kKvFrame).kv_frame());
    }
  }
  ASSERT_TRUE(Waits());
  EXPECT_EQ(Metric("prefilld_live_requests"), 1);

  const auto stub = NewResumptionStub();
  Resumed resumed(*stub, From(frames.size()));
  v1::PrefillEvent event;
  ASSERT_TRUE(resumed.reader->Read(&event));
  ASSERT_TRUE(event.has_accepted());
  EXPECT_EQ(event.accepted().layout().SerializeAsString(), layout.SerializeAsString());
  v1::PrefillResult result;
  while (resumed.reader->Read(&event)) {
    if (event.has_kv_frame()) {
      EXPECT_EQ(event.kv_frame().sequence(), frames.size());
      frames.push_back(event.kv_frame());
      ASSERT_TRUE(Acknowledge(0, frames.size()).ok());
    } else if (event.has_result()) {
      result = event.result();
    }
  }
  EXPECT_TRUE(resumed.reader->Finish().ok());
  EXPECT_EQ(result.kv_frames(), frames.size());
  ExpectWholeCache(frames, layout);
  EXPECT_EQ(engine_->layers_run(), 4);
  EXPECT_EQ(Metric("prefilld_resumed_streams_total"), 1);
  EXPECT_TRUE(Acknowledge(0, frames.size(), {}, /*complete=*/true).ok());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("ok"), 1);
  EXPECT_EQ(CancelRequest().error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(Resumption, TheResultComesOnceEverythingIsAcknowledgedAndAgainIfItIsLost) {
  StartServer();
  OpenStream stream(*NewStub(), Resumable(10));
  uint64_t received = 0;
  while (received < 4) {
    received += stream.ReadUntil(v1::PrefillEvent::kKvFrame).kv_frame().num_blocks() > 0 ? 1 : 0;
  }
  EXPECT_EQ(Acknowledge(0, 3, {}, /*complete=*/true).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  ASSERT_TRUE(Acknowledge(0, 4).ok());
  EXPECT_EQ(stream.ReadUntil(v1::PrefillEvent::kResult).result().kv_frames(), 4);
  EXPECT_TRUE(stream.Finish().ok());
  const auto stub = NewResumptionStub();
  const StreamContents again = Resumed(*stub, From(4)).Rest();
  EXPECT_TRUE(again.status.ok()) << again.status.error_message();
  ASSERT_EQ(again.events.size(), 2);
  EXPECT_TRUE(again.events[1].has_result());
  EXPECT_TRUE(Acknowledge(0, 4, {}, /*complete=*/true).ok());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("ok"), 1);
}

TEST_F(Resumption, AResultThatWasSentIsGivenUpAfterTheWindowAndTheRequestWasServed) {
  StartServer();
  {
    OpenStream stream(*NewStub(), Resumable(10));
    for (int i = 0; i < 4; ++i) stream.ReadUntil(v1::PrefillEvent::kKvFrame);
    ASSERT_TRUE(Acknowledge(0, 4).ok());
    EXPECT_NE(stream.Rest().result(), nullptr);
  }
  ASSERT_TRUE(Waits());
  clock_.Advance(absl::Seconds(11));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("ok"), 1);
}

TEST_F(Resumption, WhoNeverComesBackIsGivenUpAfterTheWindow) {
  StartServer();
  engine_->HoldAfter(2);
  {
    OpenStream stream(*NewStub(), Resumable(20'000));
    stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  }
  ASSERT_TRUE(Waits());
  clock_.Advance(absl::Seconds(5));
  AwaitWatchdog();
  EXPECT_EQ(Metric("prefilld_live_requests"), 1);
  EXPECT_GT(Metric("prefilld_waiting_for_consumer_bytes"), 0);
  EXPECT_GT(Metric("prefilld_kv_frames_retained"), 0);
  clock_.Advance(absl::Seconds(6));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("not_resumed"), 1);
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_kv_frames_retained") == 0; }));
  const auto stub = NewResumptionStub();
  EXPECT_EQ(Resumed(*stub, From(0)).Rest().status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(Resumption, WithoutAWindowABrokenConnectionEndsTheRequestAtOnce) {
  options_.resume_window = absl::ZeroDuration();
  StartServer();
  engine_->HoldAfter(1);
  {
    OpenStream stream(*NewStub(), Resumable(20'000));
    EXPECT_EQ(stream.ReadUntil(v1::PrefillEvent::kAccepted).accepted().resume_window_ms(), 0);
    stream.ReadUntil(v1::PrefillEvent::kKvFrame);
    EXPECT_EQ(Acknowledge(0, 1).error_code(), grpc::StatusCode::NOT_FOUND);
  }
  EXPECT_TRUE(Eventually([&] { return Ended("cancelled") == 1; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("cancelled"), 1);
  EXPECT_LE(engine_->layers_run(), 2);
}

TEST_F(Resumption, ACancelEndsTheRequestAtOnce) {
  StartServer();
  engine_->HoldAfter(1);
  OpenStream stream(*NewStub(), Resumable(20'000));
  stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  EXPECT_TRUE(CancelRequest().ok());
  EXPECT_EQ(stream.Rest().status.error_code(), grpc::StatusCode::CANCELLED);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("cancelled"), 1);
  EXPECT_LE(engine_->layers_run(), 2);
}

TEST_F(Resumption, TheDeadlineHoldsWhileTheConsumerIsAway) {
  options_.resume_window = absl::Seconds(600);
  StartServer();
  engine_->HoldAfter(1);
  {
    OpenStream stream(*NewStub(), Resumable(20'000), absl::Now() + absl::Seconds(60));
    stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  }
  ASSERT_TRUE(Waits());
  clock_.Advance(absl::Seconds(61));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Ended("deadline"), 1);
}

// Reads one lane of a request with streams that break after a few frames, each in one of the ways
// in which they do: the call is cancelled, or it is left alone while another takes its place.
class RestlessLane {
 public:
  RestlessLane(v1::ResumptionService::Stub& stub, uint32_t lane, int seed)
      : stub_(stub), lane_(lane), random_(seed) {}

  void Run() {
    while (!done_) RunOneStream();
  }
  const std::vector<v1::KvFrame>& frames() const { return frames_; }
  int streams() const { return streams_; }
  const std::optional<v1::PrefillResult>& result() const { return result_; }

 private:
  void RunOneStream() {
    ++streams_;
    v1::ResumeRequest request = Named<v1::ResumeRequest>();
    request.set_lane(lane_);
    request.set_received(frames_.size());
    // Streams that are left alone die with this.
    contexts_.push_back(std::make_unique<grpc::ClientContext>());
    readers_.push_back(stub_.Resume(contexts_.back().get(), request));
    int left = streams_ < 20 ? static_cast<int>(random_() % 5) : 1'000'000;
    v1::PrefillEvent event;
    while (readers_.back()->Read(&event)) {
      if (event.has_result()) result_ = event.result();
      if (!event.has_kv_frame() || event.kv_frame().sequence() < frames_.size()) continue;
      EXPECT_EQ(event.kv_frame().sequence(), frames_.size());
      frames_.push_back(event.kv_frame());
      // A frame whose acknowledgement is lost with its stream.
      const bool breaks = --left < 0;
      if (!breaks || random_() % 2 == 0) Acknowledge();
      if (breaks) break;
    }
    if (left < 0) {
      if (random_() % 2 == 0) contexts_.back()->TryCancel();
      return;
    }
    done_ = readers_.back()->Finish().ok();
    if (!done_) absl::SleepFor(absl::Milliseconds(1));
  }

  void Acknowledge() {
    auto request = Named<v1::AcknowledgeRequest>();
    v1::LaneReceipt& receipt = *request.add_lanes();
    receipt.set_lane(lane_);
    receipt.set_received(frames_.size());
    grpc::ClientContext context;
    v1::AcknowledgeResponse response;
    const grpc::Status status = stub_.Acknowledge(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
  }

  v1::ResumptionService::Stub& stub_;
  const uint32_t lane_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts_;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::PrefillEvent>>> readers_;
  std::vector<v1::KvFrame> frames_;
  std::optional<v1::PrefillResult> result_;
  int streams_ = 0;
  bool done_ = false;
};

TEST_F(Resumption, LanesThatBreakAgainAndAgainBringTheWholeCache) {
  StartServer();
  engine_->set_layer_time(absl::Milliseconds(5));
  v1::KvLayout layout;
  const auto stub = NewStub();
  OpenStream first(*stub, Resumable(20'000, 3));
  layout = first.ReadUntil(v1::PrefillEvent::kAccepted).accepted().layout();
  std::vector<std::unique_ptr<v1::ResumptionService::Stub>> stubs;
  std::vector<std::unique_ptr<RestlessLane>> lanes;
  std::vector<std::thread> threads;
  for (uint32_t lane = 0; lane < 3; ++lane) {
    stubs.push_back(NewResumptionStub());
    lanes.push_back(std::make_unique<RestlessLane>(*stubs.back(), lane, lane + 1));
  }
  for (const auto& lane : lanes) threads.emplace_back([&lane] { lane->Run(); });
  for (std::thread& thread : threads) thread.join();

  ASSERT_TRUE(lanes[0]->result().has_value());
  std::vector<v1::KvFrame> frames;
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_GT(lanes[i]->streams(), 1);
    EXPECT_EQ(lanes[i]->frames().size(), lanes[0]->result()->frames_per_lane(static_cast<int>(i)));
    frames.insert(frames.end(), lanes[i]->frames().begin(), lanes[i]->frames().end());
  }
  ExpectWholeCache(frames, layout);
  EXPECT_EQ(engine_->layers_run(), 4);
  EXPECT_TRUE(Acknowledge(0, 0, {}, /*complete=*/true).ok());
  lanes.clear();
  EXPECT_TRUE(EverythingIsFree());
}

}  // namespace
}  // namespace prefilld::server
