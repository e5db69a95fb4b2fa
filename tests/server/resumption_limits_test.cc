// Tests what consumers of resumable requests may not have or say, and how often.
#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <gmock/gmock.h>

#include "tests/server/resumption_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

TEST_F(Resumption, DamagedFramesComeOnceMore) {
  StartServer();
  OpenStream stream(*NewStub(), Resumable(20'000));
  std::map<uint64_t, int> copies;
  std::vector<v1::KvFrame> frames;
  v1::KvLayout layout;
  v1::PrefillEvent event;
  std::set<uint64_t> missing;
  uint64_t end = 0;
  while (stream.Read(&event)) {
    if (event.has_accepted()) layout = event.accepted().layout();
    if (!event.has_kv_frame()) continue;
    const uint64_t sequence = event.kv_frame().sequence();
    end = std::max(end, sequence + 1);
    if (++copies[sequence] == 1 && sequence % 5 == 3) {
      missing.insert(sequence);
      ASSERT_TRUE(Acknowledge(0, *missing.begin(), {sequence}).ok());
      continue;
    }
    missing.erase(sequence);
    frames.push_back(event.kv_frame());
    ASSERT_TRUE(Acknowledge(0, missing.empty() ? end : *missing.begin()).ok());
  }
  EXPECT_TRUE(stream.Finish().ok());
  ExpectWholeCache(frames, layout);
  double again = 0;
  for (const auto& [sequence, count] : copies) {
    EXPECT_EQ(count, sequence % 5 == 3 ? 2 : 1) << "frame " << sequence;
    again += count - 1;
  }
  EXPECT_GT(again, 5);
  EXPECT_EQ(Metric("prefilld_kv_frames_resent_total{cause=\"damaged\"}"), again);
}

TEST_F(Resumption, WhoSaysOfEveryCopyThatItIsDamagedIsEnded) {
  StartServer();
  OpenStream stream(*NewStub(), Resumable(20'000));
  stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  grpc::Status answer;
  int asked = 0;
  while (answer.ok() && ++asked < 100) {
    answer = Acknowledge(0, 0, {0});
    v1::PrefillEvent event;
    while (answer.ok() && stream.Read(&event) &&
           !(event.has_kv_frame() && event.kv_frame().sequence() == 0)) {
    }
  }
  EXPECT_EQ(asked, 17);
  EXPECT_EQ(answer.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(answer.error_message(), "damaged: 17 copies of frame 0; at most 16");
  const grpc::Status end = stream.Rest().status;
  EXPECT_EQ(end.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(end.error_message(), answer.error_message());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_TRUE(Eventually([&] { return Ended("damaged") == 1; }));
  EXPECT_EQ(Metric("prefilld_kv_frames_resent_total{cause=\"damaged\"}"), 16);
}

TEST_F(Resumption, StrangersAndNonsenseAreRefused) {
  StartServer();
  engine_->HoldAfter(1);
  OpenStream stream(*NewStub(), Resumable(20'000));
  stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  const auto stub = NewResumptionStub();
  const auto code_of = [&](const v1::ResumeRequest& request) {
    return Resumed(*stub, request).Rest().status.error_code();
  };
  v1::ResumeRequest stranger = From(0);
  stranger.set_resume_key("0123456789abcdef0123456789abcdee");
  EXPECT_EQ(code_of(stranger), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(Refusals("forbidden"), 1);
  EXPECT_EQ(code_of(From(0, /*lane=*/1)), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(code_of(From(1'000'000)), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(Acknowledge(0, 1'000'000).error_code(), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(Acknowledge(5, 0).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Acknowledge(0, 0, std::vector<uint64_t>(65, 0)).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Acknowledge(0, 0, {}, /*complete=*/true).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(Refusals("invalid"), 6);
  EXPECT_EQ(Refusals("model"), 0) << "nobody asked for another model";
  v1::PrefillRequest short_key = PromptOf(10, "other"), nameless = PromptOf(10);
  short_key.set_resume_key("short");
  nameless.set_resume_key(kKey);
  EXPECT_THAT(Prefill(short_key).status.error_message(), HasSubstr("resume_key has 5"));
  EXPECT_THAT(Prefill(nameless).status.error_message(), HasSubstr("request_id"));
  EXPECT_TRUE(CancelRequest().ok());
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_TRUE(Eventually([&] {
    return CancelRequest().error_code() == grpc::StatusCode::NOT_FOUND && Refusals("over") > 0;
  }));
  const double over = Refusals("over");
  EXPECT_EQ(code_of(From(0)), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Acknowledge(0, 0).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Refusals("over"), over + 2);
}

TEST_F(Resumption, BeyondTheirShareOfTheStagingMemoryRequestsDoNotWait) {
  options_.staging_bytes = 12 << 20;
  StartServer();
  // Each may hold up to half of what is free, and half of the ring is for those that wait.
  std::vector<v1::PrefillRequest> requests;
  for (const char* id : {"a", "b", "c"}) {
    requests.push_back(Resumable(20'000));
    requests.back().set_request_id(id);
  }
  {
    std::vector<std::unique_ptr<OpenStream>> streams;
    for (const auto& request : requests) {
      streams.push_back(std::make_unique<OpenStream>(*NewStub(), request));
      streams.back()->ReadUntil(v1::PrefillEvent::kKvFrame);
    }
    EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") >= 8 << 20; }));
  }
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_resume_refused_total") >= 1; }));
  EXPECT_TRUE(Eventually([&] {
    return Metric("prefilld_waiting_for_consumer") >= 1 &&
           Metric("prefilld_waiting_for_consumer_bytes") <= 6 << 20;
  }));
  clock_.Advance(absl::Seconds(11));
  EXPECT_TRUE(EverythingIsFree());
}

}  // namespace
}  // namespace prefilld::server
