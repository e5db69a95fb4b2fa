// Tests pushes to receivers whose receipts are lost, late or make no sense.
#include <memory>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <grpcpp/security/credentials.h>

#include "absl/strings/str_cat.h"
#include "server/push_dialer.h"
#include "tests/server/job_harness.h"
#include "tests/server/lane_receiver.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

using Answer = LaneReceiver::Answer;
using Receipts = std::vector<v1::ReceiveReceipt>;

Answer Take(const v1::KvFrame&) { return Answer::kTake; }
grpc::Status Admit(const v1::ReceiveOpen&, int) { return grpc::Status::OK; }
grpc::Status Broken() { return {grpc::StatusCode::UNAVAILABLE, "it broke"}; }

class PushReceipts : public ServerFixture {
 protected:
  PushReceipts() {
    options_.deliver_to_allow = {"127.0.0.1:*"};
    options_.frame_bytes = 256 << 10;
  }

  StreamContents PushTo(const LaneReceiver& receiver, uint32_t num_lanes = 1) {
    v1::PrefillRequest request = PromptOf(5000, "pushed");
    request.set_num_lanes(num_lanes);
    request.mutable_deliver_to()->set_address(receiver.address());
    request.mutable_deliver_to()->set_transfer_id("transfer-7");
    // A push that never ended would hold up the test.
    OpenStream call(*stub_, request, absl::Now() + absl::Seconds(40));
    return call.Rest();
  }
  void ExpectWhole(LaneReceiver& receiver, const StreamContents& contents) {
    ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
    ExpectWholeCache(receiver.frames(), contents.events.front().accepted().layout());
    EXPECT_TRUE(EverythingIsFree());
  }
  void ExpectEnd(const StreamContents& contents, grpc::StatusCode code, const char* reason) {
    EXPECT_EQ(contents.status.error_code(), code);
    EXPECT_THAT(contents.status.error_message(), HasSubstr(reason));
    // The caller may have its answer before it is counted.
    EXPECT_TRUE(Eventually(
        [&] { return Metric("prefilld_requests_total{outcome=\"receiver_failed\"}") == 1; }));
    EXPECT_TRUE(EverythingIsFree());
  }
};

TEST_F(PushReceipts, ALastOneThatIsLostIsSaidAgain) {
  StartServer();
  LaneReceiver receiver;
  receiver.breaks_at_result = 1;
  ExpectWhole(receiver, PushTo(receiver, 2));
  EXPECT_EQ(receiver.opens().size(), 3);
  EXPECT_EQ(Metric("prefilld_kv_frames_resent_total{cause=\"resumed\"}"), 0);
  AwaitWatchdog();
  EXPECT_EQ(Metric("prefilld_waiting_for_consumer"), 0);
}

TEST_F(PushReceipts, ForMoreThanWasSentEndThePush) {
  StartServer();
  LaneReceiver receiver(Take, Admit, [](v1::ReceiveReceipt receipt, int) {
    receipt.set_received(receipt.received() + 1);
    return Receipts{receipt};
  });
  ExpectEnd(PushTo(receiver), grpc::StatusCode::OUT_OF_RANGE,
            "received 1; 0 frames of the lane were sent");
}

TEST_F(PushReceipts, OfANewStreamThatForgetFramesEndThePush) {
  StartServer();
  LaneReceiver receiver(
      [](const v1::KvFrame& frame) {
        return frame.sequence() < 3 ? Answer::kTake : Answer::kBreak;
      },
      Admit,
      [](v1::ReceiveReceipt receipt, int opened_before) {
        if (opened_before > 0) receipt.set_received(1);
        return Receipts{receipt};
      });
  ExpectEnd(PushTo(receiver), grpc::StatusCode::OUT_OF_RANGE, "were acknowledged and are gone");
}

TEST_F(PushReceipts, WithTooManyDamagedFramesEndThePush) {
  StartServer();
  LaneReceiver receiver(Take, Admit, [](v1::ReceiveReceipt receipt, int) {
    for (uint64_t i = 0; i < 65; ++i) receipt.add_damaged(i);
    return Receipts{receipt};
  });
  ExpectEnd(PushTo(receiver), grpc::StatusCode::INVALID_ARGUMENT, "65 damaged frames; at most 64");
}

TEST_F(PushReceipts, AreIgnoredForFramesThatAreNotKept) {
  StartServer();
  LaneReceiver receiver(Take, Admit, [](v1::ReceiveReceipt receipt, int) {
    for (const uint64_t sequence : {uint64_t{0}, receipt.received() + 1000, ~uint64_t{0}}) {
      if (sequence >= receipt.received() + 1000 || receipt.received() > 0) {
        receipt.add_damaged(sequence);
      }
    }
    return Receipts{receipt};
  });
  ExpectWhole(receiver, PushTo(receiver));
  EXPECT_EQ(receiver.arrivals, receiver.frames().size());
}

TEST_F(PushReceipts, ThatSayCompleteTooEarlyAreNotBelieved) {
  options_.resume_window = absl::Milliseconds(300);
  StartServer();
  LaneReceiver receiver(Take, Admit, [](v1::ReceiveReceipt receipt, int) {
    receipt.set_complete(true);
    return Receipts{receipt};
  });
  ExpectEnd(PushTo(receiver), grpc::StatusCode::DATA_LOSS, "says complete");
}

// They would look like progress each time that the stream breaks.
TEST_F(PushReceipts, ThatGoBackAndForthKeepNoPushAlive) {
  options_.resume_window = absl::Milliseconds(300);
  StartServer();
  LaneReceiver receiver(
      [](const v1::KvFrame& frame) {
        return frame.sequence() < 3 ? Answer::kTake : Answer::kBreak;
      },
      Admit,
      [](const v1::ReceiveReceipt& truth, int opened_before) {
        v1::ReceiveReceipt less = truth;
        less.set_received(0);
        return opened_before % 2 == 0 ? Receipts{truth} : Receipts{truth, less};
      });
  ExpectEnd(PushTo(receiver), grpc::StatusCode::UNAVAILABLE, "it broke");
}

// Lane 0 would wait for as long.
TEST_F(PushReceipts, ALaneThatHasHadNoneIsCalledForTheWindow) {
  StartServer();
  std::atomic<int> refusals = 0;
  LaneReceiver receiver(Take, [&refusals](const v1::ReceiveOpen& open, int) {
    return open.lane() == 1 && ++refusals <= 6 ? Broken() : grpc::Status::OK;
  });
  ExpectWhole(receiver, PushTo(receiver, 2));
  EXPECT_GT(refusals, 6);
}

// The receiver has ended the transfer for a reason, and forgotten it.
TEST_F(PushReceipts, WhyTheReceiverEndedIsNotLostWhenItIsCalledAgain) {
  StartServer();
  LaneReceiver receiver(Take, [](const v1::ReceiveOpen&, int opened_before) {
    return opened_before == 0 ? grpc::Status(grpc::StatusCode::DATA_LOSS, "a block came twice")
                              : grpc::Status(grpc::StatusCode::NOT_FOUND, "nobody waits for it");
  });
  ExpectEnd(PushTo(receiver), grpc::StatusCode::DATA_LOSS, "a block came twice");
}

// The stream was repaired, and there for longer than the window: nothing new had to come meanwhile.
TEST_F(PushReceipts, ALaneThatBreaksAgainAfterAQuietTimeIsCalledAgain) {
  StartServer();
  std::atomic<int> arrivals = 0;
  LaneReceiver receiver([&](const v1::KvFrame& frame) {
    if (frame.sequence() != 3 || ++arrivals > 2) return Answer::kTake;
    if (arrivals == 2) clock_.Advance(options_.resume_window + absl::Seconds(1));
    return Answer::kBreak;
  });
  ExpectWhole(receiver, PushTo(receiver));
  EXPECT_EQ(arrivals, 3);
}

TEST_F(PushReceipts, APushThatIsUnderWayAtItsDeadlineIsNoFailureOfTheReceiver) {
  FakeEngine engine{FakeEngineOptions()};
  Metrics metrics(engine.info(), {Tenant()});
  PushDialer dialer(grpc::InsecureChannelCredentials(), /*use_proxy=*/false, clock_,
                    absl::Seconds(30), metrics.resumption());
  LaneReceiver receiver;
  receiver.answers_opening = false;
  PrefillWork work = WorkOf(engine, 100, "pushed");
  work.deliver_to.set_address(receiver.address());
  work.deliver_to.set_transfer_id("transfer-7");
  work.transfer_key = std::string(32, 'k');
  work.resume_window = absl::Seconds(10);
  work.deadline = clock_.Now() + absl::Milliseconds(500);
  const auto job = std::make_shared<PrefillJob>(std::move(work), clock_);
  dialer.Start(job);
  EXPECT_TRUE(Eventually([&] { return job->ended(); }));
  EXPECT_EQ(job->ending().outcome, Outcome::kDeadline);
  EXPECT_TRUE(absl::IsDeadlineExceeded(job->ending().status)) << job->ending().status;
  dialer.AwaitIdle();
}

// A call that has ended keeps nothing of its push alive, however often it was made again.
TEST_F(PushReceipts, APushThatIsOverIsFreed) {
  FakeEngine engine{FakeEngineOptions()};
  Metrics metrics(engine.info(), {Tenant()});
  PushDialer dialer(grpc::InsecureChannelCredentials(), /*use_proxy=*/false, clock_,
                    absl::Seconds(30), metrics.resumption());
  LaneReceiver receiver(Take, [](const v1::ReceiveOpen&, int opened_before) {
    return opened_before < 2 ? Broken() : grpc::Status::OK;
  });
  PrefillWork work = WorkOf(engine, 100, "pushed");
  work.deliver_to.set_address(receiver.address());
  work.deliver_to.set_transfer_id("transfer-7");
  work.transfer_key = std::string(32, 'k');
  work.resume_window = absl::Seconds(10);
  auto job = std::make_shared<PrefillJob>(std::move(work), clock_);
  dialer.Start(job);
  job->delivery().SendResult({});
  EXPECT_TRUE(Eventually([&] { return job->delivery().result_is_out(); }));
  EXPECT_EQ(receiver.opens().size(), 3);
  dialer.AwaitIdle();
  const std::weak_ptr<PrefillJob> freed = job;
  job.reset();
  EXPECT_TRUE(Eventually([&] { return freed.expired(); }));
}

}  // namespace
}  // namespace prefilld::server
