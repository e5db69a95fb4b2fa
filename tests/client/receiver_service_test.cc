// Tests caches that are pushed to a worker, and what hostile senders can do.
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "tests/client/worker_fixture.h"

namespace prefilld::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(WorkerServices, APushedCacheIsAnsweredAndDecoded) {
  ReceiveResponse response;
  const Reply reply = GenerateWithPush([&] {
    const grpc::Status status = Push(SmallLayout(), AllFrames(), &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
  });
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_THAT(reply.tokens, ElementsAre(7, 8, 9, 10));
  EXPECT_EQ(response.kv_frames(), 3);
  EXPECT_EQ(response.kv_bytes(), reply.result.kv_bytes());
  EXPECT_EQ(decoder_.stored().size(), 18);
  ExpectPoolFree();
}

TEST_F(WorkerServices, AWaitForAPushIsNotSilent) {
  ReceiveResponse response;
  const Reply reply = GenerateWithPush([&] {
    absl::SleepFor(absl::Milliseconds(1300));
    EXPECT_TRUE(Push(SmallLayout(), AllFrames(), &response).ok());
  });
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_GE(reply.progress, 1);
}

TEST_F(WorkerServices, APushedCacheThatIsDamagedIsDataLossOnBothSides) {
  std::vector<KvFrame> frames = AllFrames();
  frames[1].set_checksum(frames[1].checksum() + 1);
  ReceiveResponse response;
  const Reply reply = GenerateWithPush([&] {
    EXPECT_EQ(Push(SmallLayout(), frames, &response).error_code(), grpc::StatusCode::DATA_LOSS);
  });
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_THAT(reply.status.error_message(), HasSubstr("checksum"));
  ExpectPoolFree();
}

TEST_F(WorkerServices, APushedCacheWithAFrameMissingIsDataLossOnBothSides) {
  std::vector<KvFrame> frames = AllFrames();
  frames.pop_back();
  ReceiveResponse response;
  const Reply reply = GenerateWithPush([&] {
    EXPECT_EQ(Push(SmallLayout(), frames, &response).error_code(), grpc::StatusCode::DATA_LOSS);
  });
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::DATA_LOSS);
}

TEST_F(WorkerServices, APushedCacheOfAnotherLayoutIsRefused) {
  KvLayout layout = SmallLayout();
  layout.set_model_fingerprint("beef");
  ReceiveResponse response;
  const Reply reply = GenerateWithPush([&] {
    EXPECT_EQ(Push(layout, {}, &response).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  });
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(reply.status.error_message(), HasSubstr("model_fingerprint"));
}

// The payloads of this cache are smaller than the blocks of the decoder's pool.
TEST_F(WorkerServices, APushedCacheOfAnotherShapeIsRefusedThoughItsFingerprintFits) {
  KvLayout layout = SmallLayout();
  layout.set_head_dim(4);
  ReceiveResponse response;
  const Reply reply = GenerateWithPush([&] {
    const KvFrame frame = FrameEvent(layout, 0, 0, 0, 0, 3).kv_frame();
    EXPECT_EQ(Push(layout, {frame}, &response).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  });
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(reply.status.error_message(), HasSubstr("head_dim is 4, the decoder's model has 8"));
  EXPECT_TRUE(decoder_.stored().empty());
  ExpectPoolFree();
}

TEST_F(WorkerServices, APushThatNobodyWaitsForIsNotFound) {
  ReceiveResponse response;
  EXPECT_EQ(Push(SmallLayout(), AllFrames(), &response).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(WorkerServices, ALongTransferIdIsNotRepeatedInTheAnswer) {
  grpc::ClientContext context;
  ReceiveResponse response;
  const auto stream = receiver_stub_->Receive(&context, &response);
  ReceiveRequest message;
  message.mutable_open()->set_transfer_id(std::string(100'000, 'x'));
  stream->Write(message);
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_LT(status.error_message().size(), 200);
}

TEST_F(WorkerServices, AStreamThatIsOpenedAndSendsNothingIsEnded) {
  grpc::ClientContext context;
  ReceiveResponse response;
  const auto stream = receiver_stub_->Receive(&context, &response);
  const absl::Time opened = absl::Now();
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(status.error_message(), "no ReceiveOpen came within 1s");
  EXPECT_LT(absl::Now() - opened, absl::Seconds(10));
}

TEST_F(WorkerServices, AStreamThatHasOpenedMayTakeItsTime) {
  ReceiveResponse response;
  const Reply reply = GenerateWithPush([&] {
    grpc::ClientContext context;
    const auto stream = receiver_stub_->Receive(&context, &response);
    ReceiveRequest message;
    message.mutable_open()->set_transfer_id("t1");
    *message.mutable_open()->mutable_layout() = SmallLayout();
    stream->Write(message);
    absl::SleepFor(kOpenTimeout * 1.5);
    for (const KvFrame& frame : AllFrames()) {
      *message.mutable_kv_frame() = frame;
      stream->Write(message);
    }
    *message.mutable_result() = ResultEvent({3}).result();
    stream->Write(message);
    stream->WritesDone();
    const grpc::Status status = stream->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
  });
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
}

TEST_F(WorkerServices, AConnectionOpensOnlySoManyCallsAtOnce) {
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientWriter<ReceiveRequest>>> silent;
  std::vector<ReceiveResponse> responses(MaxStreamsPerConnection(options_));
  for (ReceiveResponse& response : responses) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    silent.push_back(receiver_stub_->Receive(contexts.back().get(), &response));
  }
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
  const auto beyond = stub_->Generate(&context, Request());
  GenerateEvent event;
  EXPECT_FALSE(beyond->Read(&event));
  EXPECT_EQ(beyond->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  for (const auto& stream : silent) stream->Finish();  // ended by the worker
  EXPECT_TRUE(Generate(Request()).status.ok());
}

TEST_F(WorkerServices, AWaitForAPushEndsWhenNothingComes) {
  options_.transfer_timeout = absl::Milliseconds(100);
  const Reply reply = GenerateWithPush([] {});
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  ExpectPoolFree();
}

TEST_F(WorkerServices, CancellingTheWaitEndsASilentPush) {
  GenerateRequest request = Request();
  request.set_pushed_transfer_id("t1");
  grpc::ClientContext context;
  const auto stream = stub_->Generate(&context, request);
  GenerateEvent event;
  ASSERT_TRUE(stream->Read(&event));

  grpc::ClientContext push_context;
  ReceiveResponse response;
  const auto push = receiver_stub_->Receive(&push_context, &response);
  ReceiveRequest message;
  message.mutable_open()->set_transfer_id("t1");
  *message.mutable_open()->mutable_layout() = SmallLayout();
  push->Write(message);
  *message.mutable_kv_frame() = AllFrames()[0];
  push->Write(message);
  while (decoder_.stored().empty()) absl::SleepFor(absl::Milliseconds(1));
  context.TryCancel();
  // The test sends no more: the worker ends the stream by itself.
  EXPECT_EQ(push->Finish().error_code(), grpc::StatusCode::CANCELLED);
  stream->Finish();
  ExpectPoolFree();
}

TEST_F(WorkerServices, APushingServerThatGoesAwayEndsTheWait) {
  const Reply reply = GenerateWithPush([&] {
    grpc::ClientContext context;
    ReceiveResponse response;
    const auto stream = receiver_stub_->Receive(&context, &response);
    ReceiveRequest message;
    message.mutable_open()->set_transfer_id("t1");
    *message.mutable_open()->mutable_layout() = SmallLayout();
    stream->Write(message);
    *message.mutable_kv_frame() = AllFrames()[0];
    stream->Write(message);
    while (decoder_.stored().empty()) absl::SleepFor(absl::Milliseconds(1));
    context.TryCancel();
    stream->Finish();
  });
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(reply.status.error_message(), "the pushed stream ended without a result");
  ExpectPoolFree();
}

// Sends random bytes, and good messages with random damage, to both services.
TEST_F(WorkerServices, HostileBytesLeaveItServing) {
  options_.transfer_timeout = absl::Milliseconds(20);
  grpc::GenericStub generic(channel_);
  std::mt19937_64 random(1);
  ReceiveRequest open;
  open.mutable_open()->set_transfer_id("t1");
  *open.mutable_open()->mutable_layout() = SmallLayout();
  const std::string good[] = {open.SerializeAsString(), AllFrames()[0].SerializeAsString(),
                              Request().SerializeAsString()};
  for (int i = 0; i < 300; ++i) {
    std::string bytes = good[i % 3];
    if (i % 5 == 0) bytes.assign(random() % 200, '\0');
    for (int damage = 0; damage < 8 && !bytes.empty(); ++damage) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    const char* method =
        i % 2 == 0 ? "/prefill.v1.KvReceiver/Receive" : "/prefill.v1.DecodeService/Generate";
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const auto call = generic.PrepareCall(&context, method, &queue);
    const auto wait = [&queue] {
      void* tag;
      bool ok;
      return queue.Next(&tag, &ok) && ok;
    };
    call->StartCall(nullptr);
    wait();
    const grpc::Slice slice(bytes);
    call->Write(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions().set_last_message(), nullptr);
    wait();
    grpc::ByteBuffer reply;
    do {
      call->Read(&reply, nullptr);
    } while (wait());
    grpc::Status status;
    call->Finish(&status, nullptr);
    wait();
    queue.Shutdown();
    wait();
  }
  ExpectPoolFree();
  EXPECT_TRUE(Generate(Request()).status.ok());
}

}  // namespace
}  // namespace prefilld::client
