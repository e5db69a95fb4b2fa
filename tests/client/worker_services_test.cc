// The worker's services over sockets, with a decoder without a model and a scripted prefill server.
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/decode_worker/generate_service.h"
#include "client/decode_worker/receiver_service.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/server_context.h"
#include "gtest/gtest.h"
#include "prefill/v1/receiver.grpc.pb.h"
#include "tests/client/fake_decoder.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::DecodeService;
using ::prefill::v1::GenerateEvent;
using ::prefill::v1::GenerateRequest;
using ::prefill::v1::GenerateResult;
using ::prefill::v1::KvFrame;
using ::prefill::v1::KvLayout;
using ::prefill::v1::KvReceiver;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::ReceiveRequest;
using ::prefill::v1::ReceiveResponse;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The whole of a small transfer whose first token is 7; its requests are kept.
class WorkerServices : public ::testing::Test {
 protected:
  WorkerServices()
      : prefill_server_([this](grpc::ServerContext& context, const PrefillRequest& request,
                               PrefillWriter& writer) {
          {
            absl::MutexLock lock(&mu_);
            last_request_ = request;
          }
          return prefill_script_(context, request, writer);
        }) {
    options_.decoder.block_tokens = 16;
    options_.max_new_tokens_limit = 100;
    options_.max_requests = 4;
    options_.transfer_timeout = absl::Seconds(20);
    prefill_client_ = *PrefillClient::Create({.address = prefill_server_.address()});
    service_ = std::make_unique<GenerateService>(WorkerContext{.options = &options_,
                                                               .decoder = &decoder_,
                                                               .pool = &pool_,
                                                               .loop = &loop_,
                                                               .prefill = prefill_client_.get(),
                                                               .transfers = &transfers_,
                                                               .metrics = &metrics_});
    receiver_ = std::make_unique<ReceiverService>(&transfers_);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service_.get());
    builder.RegisterService(receiver_.get());
    server_ = builder.BuildAndStart();
    channel_ =
        grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials());
    stub_ = DecodeService::NewStub(channel_);
    receiver_stub_ = KvReceiver::NewStub(channel_);
  }
  ~WorkerServices() override {
    server_->Shutdown(std::chrono::system_clock::now());
    service_.reset();
  }

  static GenerateRequest Request(uint32_t max_new_tokens = 4) {
    GenerateRequest request;
    for (uint32_t id = 0; id < 40; ++id) request.add_token_ids(id);
    request.set_max_new_tokens(max_new_tokens);
    return request;
  }

  struct Reply {
    std::vector<uint32_t> tokens;
    int progress = 0;
    GenerateResult result;
    grpc::Status status;
  };
  Reply Generate(const GenerateRequest& request) {
    grpc::ClientContext context;
    const auto stream = stub_->Generate(&context, request);
    Reply reply;
    GenerateEvent event;
    while (stream->Read(&event)) {
      if (event.has_token()) reply.tokens.push_back(event.token().token().token_id());
      if (event.has_progress()) ++reply.progress;
      if (event.has_result()) reply.result = event.result();
    }
    reply.status = stream->Finish();
    return reply;
  }

  // Opens a pushed stream, sends `frames`, then the result and the end.
  grpc::Status Push(const KvLayout& layout, const std::vector<KvFrame>& frames,
                    ReceiveResponse* response) {
    grpc::ClientContext context;
    const auto stream = receiver_stub_->Receive(&context, response);
    ReceiveRequest message;
    message.mutable_open()->set_transfer_id("t1");
    *message.mutable_open()->mutable_layout() = layout;
    stream->Write(message);
    for (const KvFrame& frame : frames) {
      *message.mutable_kv_frame() = frame;
      stream->Write(message);
    }
    *message.mutable_result() = ResultEvent({frames.size()}).result();
    stream->Write(message);
    stream->WritesDone();
    return stream->Finish();
  }
  static std::vector<KvFrame> AllFrames() {
    std::vector<KvFrame> frames;
    for (uint32_t layer = 0; layer < 3; ++layer) {
      frames.push_back(FrameEvent(SmallLayout(), 0, layer, layer, 0, 3).kv_frame());
    }
    return frames;
  }

  // Runs `push` once the worker waits for transfer t1; returns how the request ended.
  Reply GenerateWithPush(const std::function<void()>& push) {
    GenerateRequest request = Request();
    request.set_pushed_transfer_id("t1");
    grpc::ClientContext context;
    const auto stream = stub_->Generate(&context, request);
    GenerateEvent event;
    EXPECT_TRUE(stream->Read(&event) && event.has_started());
    std::thread pusher(push);
    Reply reply;
    while (stream->Read(&event)) {
      if (event.has_progress()) ++reply.progress;
      if (event.has_token()) reply.tokens.push_back(event.token().token().token_id());
      if (event.has_result()) reply.result = event.result();
    }
    reply.status = stream->Finish();
    pusher.join();
    return reply;
  }

  void ExpectPoolFree() {
    const absl::Time deadline = absl::Now() + absl::Seconds(5);
    while (pool_.free_blocks() < pool_.num_blocks() && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    EXPECT_EQ(pool_.free_blocks(), pool_.num_blocks());
  }

  static grpc::Status SendAll(grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    PrefillEvent progress;
    progress.mutable_progress()->set_num_layers(3);
    writer.Write(progress);
    for (uint32_t layer = 0; layer < 3; ++layer) {
      writer.Write(FrameEvent(SmallLayout(), 0, layer, layer, 0, 3));
    }
    writer.Write(ResultEvent({3}));
    return grpc::Status::OK;
  }

  absl::Mutex mu_;
  PrefillRequest last_request_;
  ScriptedServer::PrefillScript prefill_script_ = SendAll;
  ScriptedServer prefill_server_;
  WorkerOptions options_;
  FakeDecoder decoder_;
  KvBlockPool pool_{16};
  WorkerMetrics metrics_;
  DecodeLoop loop_{&decoder_};
  PendingTransfers transfers_;
  std::unique_ptr<PrefillClient> prefill_client_;
  std::unique_ptr<GenerateService> service_;
  std::unique_ptr<ReceiverService> receiver_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<DecodeService::Stub> stub_;
  std::unique_ptr<KvReceiver::Stub> receiver_stub_;
};

TEST_F(WorkerServices, PullsTheCacheAndDecodesFromTheFirstToken) {
  const Reply reply = Generate(Request());
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_THAT(reply.tokens, ElementsAre(7, 8, 9, 10));
  EXPECT_EQ(reply.progress, 1);
  EXPECT_EQ(reply.result.num_tokens(), 4);
  EXPECT_EQ(reply.result.finish_reason(), ::prefill::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(reply.result.kv_bytes(), 3 * 3 * 2 * decoder_.block_bytes());
  EXPECT_EQ(reply.result.layers_computed_at_first_frame(), 1);
  EXPECT_NEAR(reply.result.kv_overlap(), 2.0 / 3, 1e-6);
  ExpectPoolFree();

  absl::MutexLock lock(&mu_);
  EXPECT_EQ(last_request_.model_fingerprint(), "f00d");
  EXPECT_EQ(last_request_.layout().dtype(), ::prefill::v1::DTYPE_FP32);
  EXPECT_EQ(last_request_.token_ids_size(), 40);
}

TEST_F(WorkerServices, StoresKeysAndValuesOfEachBlockAtItsPoolBlock) {
  ASSERT_TRUE(Generate(Request()).status.ok());
  const auto stored = decoder_.stored();
  ASSERT_EQ(stored.size(), 3 * 2 * 3);
  const std::string payload = FrameEvent(SmallLayout(), 0, 1, 1, 0, 3).kv_frame().payload();
  const size_t block = decoder_.block_bytes();
  // The pool hands out its lowest blocks first.
  EXPECT_EQ(stored.at({1, false, 2}), payload.substr(2 * block, block));
  EXPECT_EQ(stored.at({1, true, 0}), payload.substr(3 * block, block));
}

TEST_F(WorkerServices, AStopTokenEndsTheGeneration) {
  GenerateRequest request = Request(50);
  request.add_stop_token_ids(9);
  Reply reply = Generate(request);
  EXPECT_THAT(reply.tokens, ElementsAre(7, 8, 9));
  EXPECT_EQ(reply.result.finish_reason(), ::prefill::v1::FINISH_REASON_STOP);
  request.add_stop_token_ids(7);
  EXPECT_THAT(Generate(request).tokens, ElementsAre(7));
}

TEST_F(WorkerServices, RefusesBadRequestsByFieldValueAndLimit) {
  const auto refused = [&](const GenerateRequest& request, const char* message) {
    const grpc::Status status = Generate(request).status;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr(message));
  };
  GenerateRequest request = Request();
  request.clear_token_ids();
  refused(request, "token_ids is empty");
  request = Request();
  request.set_token_ids(3, 100);
  refused(request, "token_ids[3] is 100, the vocabulary has 100");
  refused(Request(0), "max_new_tokens is 0, allowed: 1 to 100");
  refused(Request(101), "max_new_tokens is 101");
  request = Request();
  request.mutable_sampling()->set_temperature(-1);
  refused(request, "temperature");
  request = Request();
  request.set_request_id("a\nforged line");
  refused(request, "request_id of 13 bytes, allowed: at most 128 printable ASCII");
  request = Request();
  request.set_pushed_transfer_id(std::string(129, 'x'));
  refused(request, "pushed_transfer_id of 129 bytes");
}

TEST_F(WorkerServices, WhatDoesNotFitIntoThePoolIsResourceExhausted) {
  GenerateRequest request = Request(100);
  for (int i = 0; i < 200; ++i) request.add_token_ids(1);
  const grpc::Status status = Generate(request).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_message(), "the request needs 22 KV blocks; free are 16 of 16");
}

TEST_F(WorkerServices, PassesThePrefillServersStatusOn) {
  prefill_script_ = [](grpc::ServerContext&, const PrefillRequest&, PrefillWriter&) {
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "queue full", "binary details");
  };
  const grpc::Status status = Generate(Request()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_message(), "queue full");
  EXPECT_EQ(status.error_details(), "binary details");
  ExpectPoolFree();
}

TEST_F(WorkerServices, ADamagedFrameIsDataLossAndFreesTheBlocks) {
  prefill_script_ = [](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    PrefillEvent event = FrameEvent(SmallLayout(), 0, 0, 0, 0, 3);
    (*event.mutable_kv_frame()->mutable_payload())[0] ^= 1;
    writer.Write(event);
    return grpc::Status::OK;
  };
  EXPECT_EQ(Generate(Request()).status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_TRUE(decoder_.stored().empty());
  ExpectPoolFree();
}

TEST_F(WorkerServices, CancellingTheCallCancelsThePrefillAndFreesTheBlocks) {
  absl::Notification called, cancelled;
  prefill_script_ = [&](grpc::ServerContext& context, const PrefillRequest&,
                        PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    called.Notify();
    while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    cancelled.Notify();
    return grpc::Status::CANCELLED;
  };
  grpc::ClientContext context;
  const auto stream = stub_->Generate(&context, Request());
  GenerateEvent event;
  ASSERT_TRUE(stream->Read(&event));
  EXPECT_EQ(pool_.free_blocks(), pool_.num_blocks() - 3);
  called.WaitForNotification();
  context.TryCancel();
  EXPECT_TRUE(cancelled.WaitForNotificationWithTimeout(absl::Seconds(5)));
  stream->Finish();
  ExpectPoolFree();
}

TEST_F(WorkerServices, ACallerThatReadsNothingIsCutOffAndFreesTheBlocks) {
  options_.stall_timeout = absl::Milliseconds(200);
  prefill_script_ = [](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    for (uint32_t layer = 0; layer < 3; ++layer) {
      writer.Write(FrameEvent(SmallLayout(), 0, layer, layer, 0, 3));
    }
    // Passed on to the caller, and more than a stream's window.
    PrefillEvent result = ResultEvent({3});
    for (uint32_t id = 0; id < 3'000'000; ++id) {
      result.mutable_result()->mutable_first_token()->add_top_logprobs()->set_token_id(id);
    }
    writer.Write(result);
    return grpc::Status::OK;
  };
  grpc::ClientContext context;
  const auto stream = stub_->Generate(&context, Request());
  GenerateEvent event;
  ASSERT_TRUE(stream->Read(&event) && event.has_started());
  EXPECT_LT(pool_.free_blocks(), pool_.num_blocks());
  ExpectPoolFree();
  while (stream->Read(&event)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::ABORTED);
}

TEST_F(WorkerServices, CancellingDuringDecodeFreesTheBlocks) {
  decoder_.before_step = [](uint32_t) {
    absl::SleepFor(absl::Milliseconds(5));
    return absl::OkStatus();
  };
  GenerateRequest request = Request(100);
  request.set_ignore_eos(true);
  grpc::ClientContext context;
  const auto stream = stub_->Generate(&context, request);
  GenerateEvent event;
  while (stream->Read(&event)) {
    if (event.has_token() && event.token().index() == 3) context.TryCancel();
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  ExpectPoolFree();
  EXPECT_LT(decoder_.steps().size(), 90);
}

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

// Its payloads are smaller than the blocks of the decoder's pool.
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

TEST_F(WorkerServices, APulledCacheOfAnotherShapeIsRefused) {
  prefill_script_ = [](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    KvLayout layout = SmallLayout();
    layout.set_num_layers(2);
    writer.Write(AcceptedEvent(layout, 1));
    for (uint32_t layer = 0; layer < 2; ++layer) {
      writer.Write(FrameEvent(layout, 0, layer, layer, 0, 3));
    }
    writer.Write(ResultEvent({2}));
    return grpc::Status::OK;
  };
  const grpc::Status status = Generate(Request()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("num_layers is 2"));
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
  // No more is sent: the worker ends the stream of its own accord.
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

// Random bytes, and random damage to good messages, on both services.
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

TEST_F(WorkerServices, ADrainingWorkerTakesNothingNewAndFinishesWhatRuns) {
  absl::Notification started, release;
  prefill_script_ = [&](grpc::ServerContext& context, const PrefillRequest& request,
                        PrefillWriter& writer) {
    started.Notify();
    release.WaitForNotification();
    return SendAll(context, request, writer);
  };
  Reply running;
  std::thread caller([&] { running = Generate(Request()); });
  started.WaitForNotification();
  EXPECT_FALSE(service_->Drain(absl::Milliseconds(10)));
  EXPECT_EQ(Generate(Request()).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  release.Notify();
  EXPECT_TRUE(service_->Drain(absl::Seconds(5)));
  caller.join();
  EXPECT_TRUE(running.status.ok());
}

}  // namespace
}  // namespace prefilld::client
