#include "client/decode_worker/decode_loop.h"

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_decoder.h"

namespace prefilld::client {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;

DecodeRequest Request(uint32_t first_token, uint32_t max_new_tokens) {
  DecodeRequest request;
  request.first_token = first_token;
  request.num_prompt_tokens = 40;
  request.stop.max_new_tokens = max_new_tokens;
  request.stop.stop_token_ids = {99};
  return request;
}

std::vector<uint32_t> TakeAll(DecodeLoop::Stream& stream) {
  std::vector<uint32_t> ids;
  while (true) {
    const auto token = stream.Next();
    if (!token.ok() || !token->has_value()) return ids;
    ids.push_back((*token)->token_id);
  }
}

TEST(DecodeLoop, FeedsEachTokenAtItsPositionUntilTheLength) {
  FakeDecoder decoder;
  DecodeLoop loop(&decoder);
  const auto stream = loop.Start(Request(10, 4), nullptr);
  EXPECT_THAT(TakeAll(*stream), ElementsAre(11, 12, 13));
  EXPECT_EQ(stream->finish(), Finish::kLength);
  EXPECT_THAT(decoder.steps(), ElementsAre(Pair(10, 40), Pair(11, 41), Pair(12, 42)));
}

TEST(DecodeLoop, EndsWhereTheModelsPositionsEnd) {
  FakeDecoder decoder;
  DecodeLoop loop(&decoder);
  DecodeRequest request = Request(10, 50);
  request.stop.tokens_to_positions_end = 3;
  const auto stream = loop.Start(request, nullptr);
  EXPECT_THAT(TakeAll(*stream), ElementsAre(11, 12));
  EXPECT_EQ(stream->finish(), Finish::kPositions);
  EXPECT_THAT(decoder.steps(), ElementsAre(Pair(10, 40), Pair(11, 41)));
}

TEST(DecodeLoop, StopsAtAStopTokenWhichIsTheLastOne) {
  FakeDecoder decoder;
  DecodeLoop loop(&decoder);
  const auto stream = loop.Start(Request(97, 50), nullptr);
  EXPECT_THAT(TakeAll(*stream), ElementsAre(98, 99));
  EXPECT_EQ(stream->finish(), Finish::kStop);
}

TEST(DecodeLoop, TakesOneStepOfEachSequenceInTurn) {
  FakeDecoder decoder;
  absl::Notification both_started;
  decoder.before_step = [&](uint32_t) {
    both_started.WaitForNotification();
    return absl::OkStatus();
  };
  DecodeLoop loop(&decoder);
  const auto low = loop.Start(Request(0, 6), nullptr);
  const auto high = loop.Start(Request(50, 6), nullptr);
  both_started.Notify();
  EXPECT_THAT(TakeAll(*low), ElementsAre(1, 2, 3, 4, 5));
  EXPECT_THAT(TakeAll(*high), ElementsAre(51, 52, 53, 54, 55));
  const auto steps = decoder.steps();
  ASSERT_EQ(steps.size(), 10);
  for (size_t i = 1; i < steps.size(); ++i) {
    EXPECT_NE(steps[i].first < 50, steps[i - 1].first < 50) << "step " << i;
  }
}

TEST(DecodeLoop, TheDecodersErrorEndsItsSequenceAlone) {
  FakeDecoder decoder;
  decoder.before_step = [](uint32_t token) {
    return token == 52 ? absl::InternalError("device failed") : absl::OkStatus();
  };
  DecodeLoop loop(&decoder);
  const auto good = loop.Start(Request(0, 10), nullptr);
  const auto bad = loop.Start(Request(50, 10), nullptr);
  EXPECT_EQ(TakeAll(*good).size(), 9);
  TakeAll(*bad);
  EXPECT_EQ(bad->Next().status().message(), "device failed");
}

TEST(DecodeLoop, CancellationWakesTheReaderDuringAStep) {
  FakeDecoder decoder;
  absl::Notification stepping, release;
  decoder.before_step = [&](uint32_t) {
    stepping.Notify();
    release.WaitForNotification();
    return absl::OkStatus();
  };
  DecodeLoop loop(&decoder);
  Cancellation cancellation;
  auto stream = loop.Start(Request(0, 1000), &cancellation);
  stepping.WaitForNotification();
  cancellation.Cancel();
  EXPECT_EQ(stream->Next().status().code(), absl::StatusCode::kCancelled);
  release.Notify();
  stream.reset();  // waits for the step, which still uses the block table
  EXPECT_EQ(decoder.steps().size(), 1);
}

TEST(DecodeLoop, AStreamThatIsDroppedLeavesTheLoop) {
  FakeDecoder decoder;
  DecodeLoop loop(&decoder);
  auto dropped = loop.Start(Request(0, 1u << 31), nullptr);
  ASSERT_TRUE(dropped->Next().ok());
  dropped.reset();
  const size_t steps = decoder.steps().size();
  const auto next = loop.Start(Request(50, 3), nullptr);
  EXPECT_THAT(TakeAll(*next), ElementsAre(51, 52));
  EXPECT_EQ(decoder.steps().size(), steps + 2);
}

}  // namespace
}  // namespace prefilld::client
