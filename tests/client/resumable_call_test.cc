// Tests the client of a resumable request, beside a server that the test plays.
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "prefill/v1/resumption.grpc.pb.h"
#include "proto/wire/lane_patience.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::AcknowledgeRequest;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::ResumeRequest;
using ::testing::ElementsAre;
using wire::LanePatience;

constexpr absl::Duration kPatience = absl::Seconds(20);

// A server whose request outlives its streams. It answers with scripts, and takes notes.
class ResumableServer final : public ::prefill::v1::PrefillService::Service,
                              public ::prefill::v1::ResumptionService::Service {
 public:
  using PrefillScript = std::function<grpc::Status(PrefillWriter&)>;
  using ResumeScript = std::function<grpc::Status(const ResumeRequest&, PrefillWriter&)>;

  ResumableServer(PrefillScript prefill, ResumeScript resume)
      : prefill_(std::move(prefill)), resume_(std::move(resume)) {
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(static_cast<::prefill::v1::PrefillService::Service*>(this));
    builder.RegisterService(static_cast<::prefill::v1::ResumptionService::Service*>(this));
    server_ = builder.BuildAndStart();
    address_ = absl::StrCat("127.0.0.1:", port);
  }
  ~ResumableServer() override { server_->Shutdown(absl::ToChronoTime(absl::Now())); }

  const std::string& address() const { return address_; }

  PrefillEvent Accepted(uint32_t window_ms = 10'000) const {
    PrefillEvent event = AcceptedEvent(SmallLayout(), 1);
    event.mutable_accepted()->set_resume_window_ms(window_ms);
    return event;
  }
  static PrefillEvent Frame(uint32_t layer) {
    return FrameEvent(SmallLayout(), 0, layer, layer, 0, 3);
  }
  static PrefillEvent Damaged(uint32_t layer) {
    PrefillEvent event = Frame(layer);
    (*event.mutable_kv_frame()->mutable_payload())[50] ^= 4;
    return event;
  }

  // Waits for the client to say that so many frames have arrived, or that this one is damaged.
  bool AwaitReceived(uint64_t received) {
    absl::MutexLock lock(&mu_);
    const auto said = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return received_ >= received; };
    return mu_.AwaitWithTimeout(absl::Condition(&said), kPatience);
  }
  bool AwaitDamaged(uint64_t frame, int times = 1) {
    absl::MutexLock lock(&mu_);
    const auto said = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return damaged_[frame] >= times; };
    return mu_.AwaitWithTimeout(absl::Condition(&said), kPatience);
  }
  bool AwaitResumed() {
    absl::MutexLock lock(&mu_);
    const auto came = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !resumed_from_.empty(); };
    return mu_.AwaitWithTimeout(absl::Condition(&came), kPatience);
  }
  std::vector<uint64_t> resumed_from() {
    absl::MutexLock lock(&mu_);
    return resumed_from_;
  }
  std::atomic<int> prefills = 0, completed = 0, cancelled = 0;

 private:
  grpc::Status Prefill(grpc::ServerContext*, const PrefillRequest* request,
                       PrefillWriter* writer) override {
    ++prefills;
    EXPECT_GE(request->resume_key().size(), 32);
    EXPECT_FALSE(request->request_id().empty());
    {
      absl::MutexLock lock(&mu_);
      key_ = request->resume_key();
    }
    return prefill_(*writer);
  }
  grpc::Status Resume(grpc::ServerContext*, const ResumeRequest* request,
                      PrefillWriter* writer) override {
    {
      absl::MutexLock lock(&mu_);
      EXPECT_EQ(request->resume_key(), key_);
      resumed_from_.push_back(request->received());
    }
    return resume_(*request, *writer);
  }
  grpc::Status Acknowledge(grpc::ServerContext*, const AcknowledgeRequest* request,
                           ::prefill::v1::AcknowledgeResponse*) override {
    absl::MutexLock lock(&mu_);
    for (const auto& lane : request->lanes()) {
      received_ = std::max(received_, lane.received());
      for (const uint64_t frame : lane.damaged()) ++damaged_[frame];
    }
    if (request->complete()) ++completed;
    return grpc::Status::OK;
  }
  grpc::Status Cancel(grpc::ServerContext*, const ::prefill::v1::CancelRequest*,
                      ::prefill::v1::CancelResponse*) override {
    ++cancelled;
    return grpc::Status::OK;
  }

  const PrefillScript prefill_;
  const ResumeScript resume_;
  std::string address_;
  absl::Mutex mu_;
  std::string key_ ABSL_GUARDED_BY(mu_);
  std::vector<uint64_t> resumed_from_ ABSL_GUARDED_BY(mu_);
  uint64_t received_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<uint64_t, int> damaged_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<grpc::Server> server_;
};

class CountingSink : public KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override {
    ++accepted;
    return absl::OkStatus();
  }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    ++frames[frame.layer];
    return frame_status;
  }
  int accepted = 0;
  std::map<uint32_t, int> frames;
  absl::Status frame_status;
};

// The client is gone when this returns, and so has said all that it had to say.
absl::Status Receive(ResumableServer& server, KvSink& sink) {
  const auto client = PrefillClient::Create({.address = server.address()});
  return (*client)->Prefill(SmallRequest(), sink, {.resumable = true}).status();
}

const grpc::Status kBroken(grpc::StatusCode::UNAVAILABLE, "the connection broke");

TEST(ResumableCall, GoesOnFromWhatHasArrived) {
  std::atomic<ResumableServer*> self = nullptr;
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        writer.Write(ResumableServer::Frame(0));
        EXPECT_TRUE(self.load()->AwaitReceived(1));
        return kBroken;
      },
      [&](const ResumeRequest& request, PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        const uint64_t layer = request.received();
        if (layer < 3) writer.Write(ResumableServer::Frame(static_cast<uint32_t>(layer)));
        if (layer < 2) return kBroken;
        EXPECT_TRUE(self.load()->AwaitReceived(3));
        writer.Write(ResultEvent({3}));
        return grpc::Status::OK;
      });
  self = &server;
  CountingSink sink;
  const absl::Status status = Receive(server, sink);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(server.resumed_from(), ElementsAre(1, 2));
  EXPECT_EQ(sink.accepted, 1);
  EXPECT_EQ(sink.frames, (std::map<uint32_t, int>{{0, 1}, {1, 1}, {2, 1}}));
  EXPECT_EQ(server.prefills, 1);
  EXPECT_EQ(server.completed, 1);
  EXPECT_EQ(server.cancelled, 0);
}

TEST(ResumableCall, FramesThatComeAgainAreNotStoredTwice) {
  std::atomic<ResumableServer*> self = nullptr;
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        for (const uint32_t layer : {0, 1}) writer.Write(ResumableServer::Frame(layer));
        EXPECT_TRUE(self.load()->AwaitReceived(2));
        return kBroken;
      },
      [&](const ResumeRequest&, PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        for (const uint32_t layer : {0, 1, 2}) writer.Write(ResumableServer::Frame(layer));
        writer.Write(ResultEvent({3}));
        return grpc::Status::OK;
      });
  self = &server;
  CountingSink sink;
  EXPECT_TRUE(Receive(server, sink).ok());
  EXPECT_EQ(sink.frames, (std::map<uint32_t, int>{{0, 1}, {1, 1}, {2, 1}}));
}

// The number of the last frame has become that of the first, so nothing more comes on this stream.
TEST(ResumableCall, AFrameWhoseNumberIsDamagedIsAskedForAtOnce) {
  std::atomic<ResumableServer*> self = nullptr;
  const auto finish = [&](PrefillWriter& writer) {
    EXPECT_TRUE(self.load()->AwaitReceived(3));
    writer.Write(ResultEvent({3}));
    return grpc::Status::OK;
  };
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        for (const uint32_t layer : {0, 1}) writer.Write(ResumableServer::Frame(layer));
        PrefillEvent last = ResumableServer::Frame(2);
        last.mutable_kv_frame()->set_sequence(0);
        writer.Write(last);
        return self.load()->AwaitResumed() ? kBroken : finish(writer);
      },
      [&](const ResumeRequest&, PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        writer.Write(ResumableServer::Frame(2));
        return finish(writer);
      });
  self = &server;
  CountingSink sink;
  const absl::Status status = Receive(server, sink);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(server.resumed_from(), ElementsAre(2));
  EXPECT_EQ(sink.frames, (std::map<uint32_t, int>{{0, 1}, {1, 1}, {2, 1}}));
}

// The place of a frame has become one of which half was there before. The other half is still due.
TEST(ResumableCall, AFrameWhosePlaceIsDamagedLeavesNoTrace) {
  std::atomic<ResumableServer*> self = nullptr;
  const PrefillEvent second = FrameEvent(SmallLayout(), 0, 1, 0, 0, 2);
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        writer.Write(FrameEvent(SmallLayout(), 0, 0, 0, 2, 1));
        PrefillEvent misplaced = second;
        misplaced.mutable_kv_frame()->set_first_block(1);
        writer.Write(misplaced);
        EXPECT_TRUE(self.load()->AwaitResumed());
        return kBroken;
      },
      [&](const ResumeRequest&, PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        writer.Write(second);
        for (const uint32_t layer : {1, 2}) {
          writer.Write(FrameEvent(SmallLayout(), 0, layer + 1, layer, 0, 3));
        }
        writer.Write(ResultEvent({4}));
        return grpc::Status::OK;
      });
  self = &server;
  CountingSink sink;
  const absl::Status status = Receive(server, sink);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(server.resumed_from(), ElementsAre(1));
  EXPECT_EQ(sink.frames, (std::map<uint32_t, int>{{0, 2}, {1, 1}, {2, 1}}));
}

TEST(ResumableCall, ADamagedFrameIsAskedForAgain) {
  std::atomic<ResumableServer*> self = nullptr;
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        writer.Write(ResumableServer::Frame(0));
        writer.Write(ResumableServer::Damaged(1));
        writer.Write(ResumableServer::Frame(2));
        EXPECT_TRUE(self.load()->AwaitDamaged(1));
        EXPECT_TRUE(self.load()->AwaitReceived(1));
        EXPECT_FALSE(self.load()->resumed_from().size());
        writer.Write(ResumableServer::Damaged(1));
        EXPECT_TRUE(self.load()->AwaitDamaged(1, 2));
        writer.Write(ResumableServer::Frame(1));
        EXPECT_TRUE(self.load()->AwaitReceived(3));
        writer.Write(ResultEvent({3}));
        return grpc::Status::OK;
      },
      nullptr);
  self = &server;
  CountingSink sink;
  const absl::Status status = Receive(server, sink);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(sink.frames, (std::map<uint32_t, int>{{0, 1}, {1, 1}, {2, 1}}));
}

TEST(ResumableCall, AFrameThatIsDamagedAgainAndAgainIsDataLoss) {
  std::atomic<ResumableServer*> self = nullptr;
  const auto damaged_for_ever = [&](PrefillWriter& writer) {
    writer.Write(self.load()->Accepted(/*window_ms=*/300));
    for (int copy = 0; copy < 5; ++copy) writer.Write(ResumableServer::Damaged(0));
    return kBroken;
  };
  ResumableServer server(damaged_for_ever, [&](const ResumeRequest&, PrefillWriter& writer) {
    return damaged_for_ever(writer);
  });
  self = &server;
  CountingSink sink;
  EXPECT_EQ(Receive(server, sink).code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(sink.frames.empty());
  EXPECT_EQ(server.cancelled, 1);
}

// Each stream shows progress, so that the window never passes.
TEST(ResumableCall, AFrameThatIsBeyondRepairIsNotAskedForOnAnotherStream) {
  std::atomic<ResumableServer*> self = nullptr;
  const auto damaged_for_ever = [&](PrefillWriter& writer) {
    writer.Write(self.load()->Accepted());
    PrefillEvent progress;
    progress.mutable_progress()->set_layers_computed(1);
    writer.Write(progress);
    for (int copy = 0; copy < 4; ++copy) writer.Write(ResumableServer::Damaged(0));
    return kBroken;
  };
  ResumableServer server(damaged_for_ever, [&](const ResumeRequest&, PrefillWriter& writer) {
    return self.load()->resumed_from().size() < 10
               ? damaged_for_ever(writer)
               : grpc::Status(grpc::StatusCode::ABORTED, "for ever");
  });
  self = &server;
  CountingSink sink;
  EXPECT_EQ(Receive(server, sink).code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(server.resumed_from().empty());
}

TEST(ResumableCall, ARequestThatTheServerNeverHeardIsSentOnceMore) {
  std::atomic<ResumableServer*> self = nullptr;
  ResumableServer server(
      [&](PrefillWriter& writer) {
        if (self.load()->prefills == 1) return kBroken;
        writer.Write(self.load()->Accepted());
        for (const uint32_t layer : {0, 1, 2}) writer.Write(ResumableServer::Frame(layer));
        writer.Write(ResultEvent({3}));
        return grpc::Status::OK;
      },
      [](const ResumeRequest&, PrefillWriter&) {
        return grpc::Status(grpc::StatusCode::NOT_FOUND, "nobody");
      });
  self = &server;
  CountingSink sink;
  EXPECT_TRUE(Receive(server, sink).ok());
  EXPECT_EQ(server.prefills, 2);
}

TEST(ResumableCall, GivesUpAfterTheWindowWithTheFirstReason) {
  std::atomic<ResumableServer*> self = nullptr;
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted(/*window_ms=*/300));
        return kBroken;
      },
      [](const ResumeRequest&, PrefillWriter&) {
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "later words");
      });
  self = &server;
  CountingSink sink;
  const absl::Time start = absl::Now();
  EXPECT_EQ(Receive(server, sink), absl::UnavailableError("the connection broke"));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(300));
  EXPECT_GT(server.resumed_from().size(), 1);
  EXPECT_EQ(server.cancelled, 1);
}

TEST(ResumableCall, IsNotResumedWhenTheSinkOrTheServerHasRefused) {
  std::atomic<ResumableServer*> self = nullptr;
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted());
        writer.Write(ResumableServer::Frame(0));
        return grpc::Status(grpc::StatusCode::ABORTED, "too slow");
      },
      nullptr);
  self = &server;
  CountingSink sink;
  EXPECT_EQ(Receive(server, sink), absl::AbortedError("too slow"));
  sink.frame_status = absl::UnavailableError("no room");
  EXPECT_EQ(Receive(server, sink), absl::UnavailableError("no room"));
  EXPECT_TRUE(server.resumed_from().empty());
  EXPECT_EQ(server.cancelled, 2);
}

TEST(ResumableCall, IsAnOrdinaryOneWhereTheServerGrantsNoWindow) {
  std::atomic<ResumableServer*> self = nullptr;
  ResumableServer server(
      [&](PrefillWriter& writer) {
        writer.Write(self.load()->Accepted(/*window_ms=*/0));
        writer.Write(ResumableServer::Frame(0));
        return kBroken;
      },
      nullptr);
  self = &server;
  CountingSink sink;
  EXPECT_EQ(Receive(server, sink), absl::UnavailableError("the connection broke"));
  EXPECT_TRUE(server.resumed_from().empty());
  EXPECT_EQ(server.cancelled, 0);
}

TEST(LanePatience, StartsAgainWithEverythingNew) {
  LanePatience patience;
  LanePatience::State state{.accepted = true, .window = absl::Seconds(10), .progress = 1};
  const absl::Status broken = absl::UnavailableError("broken");
  absl::Time now = absl::UnixEpoch();
  EXPECT_EQ(patience.OnBroken(broken, state, now), LanePatience::Next::kResume);
  EXPECT_EQ(patience.pause(), absl::ZeroDuration());
  now += absl::Seconds(9);
  EXPECT_EQ(patience.OnBroken(broken, state, now), LanePatience::Next::kResume);
  EXPECT_GT(patience.pause(), absl::ZeroDuration());
  ++state.progress;
  now += absl::Seconds(9);
  EXPECT_EQ(patience.OnBroken(broken, state, now), LanePatience::Next::kResume);
  now += absl::Seconds(10);
  EXPECT_EQ(patience.OnBroken(broken, state, now), LanePatience::Next::kGiveUp);
}

// Nothing new may be due for a while: a long layer is being computed.
TEST(LanePatience, DoesNotLoseTheTimeInWhichAStreamWasThere) {
  LanePatience patience;
  const LanePatience::State state{.accepted = true, .window = absl::Seconds(10), .progress = 1};
  const absl::Status broken = absl::UnavailableError("broken");
  absl::Time now = absl::UnixEpoch();
  for (int round = 0; round < 3; ++round) {
    EXPECT_EQ(patience.OnBroken(broken, state, now), LanePatience::Next::kResume);
    now += absl::Seconds(3);
    patience.OnHeard(now);
    EXPECT_TRUE(patience.is_heard());
    now += absl::Minutes(1);
  }
  EXPECT_EQ(patience.OnBroken(broken, state, now), LanePatience::Next::kResume);
  EXPECT_FALSE(patience.is_heard());
  now += absl::Seconds(1);
  EXPECT_EQ(patience.OnBroken(broken, state, now), LanePatience::Next::kGiveUp)
      << "streams that break again and again are none for ever";
}

}  // namespace
}  // namespace prefilld::client
