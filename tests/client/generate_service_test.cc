// Tests Generate over a pulled cache: its answers, its refusals, and what it gives back.
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "tests/client/worker_fixture.h"

namespace prefilld::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

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

TEST_F(WorkerServices, TheModelsLastPositionEndsTheGenerationWithAReason) {
  decoder_.mutable_config().max_positions = 42;  // the prompt has 40 tokens
  const Reply reply = Generate(Request(50));
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_THAT(reply.tokens, ElementsAre(7, 8, 9));
  EXPECT_EQ(reply.result.finish_reason(), ::prefill::v1::FINISH_REASON_POSITIONS);
  EXPECT_EQ(decoder_.steps().back().second, 41);

  // A scaled RoPE is made for more positions.
  decoder_.mutable_config().rope.kind = model::RopeKind::kLinear;
  decoder_.mutable_config().rope.factor = 2.0;
  EXPECT_EQ(Generate(Request(10)).result.finish_reason(), ::prefill::v1::FINISH_REASON_LENGTH);
}

TEST_F(WorkerServices, APromptThatFillsAllPositionsHasOneToken) {
  decoder_.mutable_config().max_positions = 40;
  const Reply reply = Generate(Request(50));
  EXPECT_THAT(reply.tokens, ElementsAre(7));
  EXPECT_EQ(reply.result.finish_reason(), ::prefill::v1::FINISH_REASON_POSITIONS);
}

TEST_F(WorkerServices, APromptPastTheModelsPositionsIsInvalid) {
  decoder_.mutable_config().max_positions = 39;
  const grpc::Status status = Generate(Request()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "token_ids has 40 tokens; the model has 39 positions");
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

TEST_F(WorkerServices, AMessageFarLargerThanItsPoolIsNotEvenRead) {
  GenerateRequest request = Request();
  const auto one_byte_each = [&request](int bytes) {
    request.mutable_token_ids()->Resize(bytes, 1);
    return request;
  };
  const int limit = MaxMessageBytes(options_, decoder_.config());
  EXPECT_LT(limit, 6 << 20);
  EXPECT_EQ(Generate(one_byte_each(limit - 100)).status.error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Generate(one_byte_each(limit)).status.error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST(MaxMessageBytes, HasRoomForAFrameOfTheModelsLargestBlock) {
  WorkerOptions options;
  options.decoder.block_tokens = 16;
  model::ModelConfig model;
  model.num_kv_heads = 40;
  model.head_dim = 128;
  const int largest_block = 2 * 128 * 40 * 128 * static_cast<int>(sizeof(float));
  EXPECT_GT(MaxMessageBytes(options, model), largest_block + 1000);
}

TEST_F(WorkerServices, AFirstTokenOutsideTheVocabularyIsDataLoss) {
  SetPrefillScript([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    for (uint32_t layer = 0; layer < 3; ++layer) {
      writer.Write(FrameEvent(SmallLayout(), 0, layer, layer, 0, 3));
    }
    PrefillEvent result = ResultEvent({3});
    result.mutable_result()->mutable_first_token()->set_token_id(100);
    writer.Write(result);
    return grpc::Status::OK;
  });
  const Reply reply = Generate(Request());
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_TRUE(reply.tokens.empty());
}

TEST_F(WorkerServices, WhatCanNeverFitIntoThePoolIsInvalid) {
  GenerateRequest request = Request(100);
  for (int i = 0; i < 116; ++i) request.add_token_ids(1);
  EXPECT_NE(Generate(request).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.add_token_ids(1);
  const grpc::Status status = Generate(request).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(),
            "token_ids has 157 tokens and max_new_tokens is 100; together at most 256 fit into "
            "this worker's KV pool");
}

TEST_F(WorkerServices, WhatFitsIntoThePoolLaterIsResourceExhausted) {
  const auto held = pool_.Reserve(14);
  const grpc::Status status = Generate(Request()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_message(), "the request needs 3 KV blocks; free are 2 of 16");
}

TEST_F(WorkerServices, PassesThePrefillServersStatusOn) {
  SetPrefillScript([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter&) {
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "queue full", "binary details");
  });
  const grpc::Status status = Generate(Request()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_message(), "queue full");
  EXPECT_EQ(status.error_details(), "binary details");
  ExpectPoolFree();
}

TEST_F(WorkerServices, ADamagedFrameIsDataLossAndFreesTheBlocks) {
  SetPrefillScript([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    PrefillEvent event = FrameEvent(SmallLayout(), 0, 0, 0, 0, 3);
    (*event.mutable_kv_frame()->mutable_payload())[0] ^= 1;
    writer.Write(event);
    return grpc::Status::OK;
  });
  EXPECT_EQ(Generate(Request()).status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_TRUE(decoder_.stored().empty());
  ExpectPoolFree();
}

TEST_F(WorkerServices, CancellingTheCallCancelsThePrefillAndFreesTheBlocks) {
  absl::Notification called, cancelled;
  SetPrefillScript([&](grpc::ServerContext& context, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    called.Notify();
    while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    cancelled.Notify();
    return grpc::Status::CANCELLED;
  });
  grpc::ClientContext context;
  const auto stream = stub_->Generate(&context, Request());
  GenerateEvent event;
  ASSERT_TRUE(stream->Read(&event));
  EXPECT_EQ(pool_.free_blocks(), pool_.num_blocks() - 3);
  called.WaitForNotification();
  context.TryCancel();
  EXPECT_TRUE(cancelled.WaitForNotificationWithTimeout(absl::Seconds(30)));
  stream->Finish();
  ExpectPoolFree();
}

TEST_F(WorkerServices, ACallerThatReadsNothingIsCutOffAndFreesTheBlocks) {
  options_.stall_timeout = absl::Milliseconds(200);
  SetPrefillScript([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    for (uint32_t layer = 0; layer < 3; ++layer) {
      writer.Write(FrameEvent(SmallLayout(), 0, layer, layer, 0, 3));
    }
    // This result is passed on to the caller, and is larger than a stream's window.
    PrefillEvent result = ResultEvent({3});
    for (uint32_t id = 0; id < 3'000'000; ++id) {
      result.mutable_result()->mutable_first_token()->add_top_logprobs()->set_token_id(id);
    }
    writer.Write(result);
    return grpc::Status::OK;
  });
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

TEST_F(WorkerServices, APulledCacheOfAnotherShapeIsRefused) {
  SetPrefillScript([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    KvLayout layout = SmallLayout();
    layout.set_num_layers(2);
    writer.Write(AcceptedEvent(layout, 1));
    for (uint32_t layer = 0; layer < 2; ++layer) {
      writer.Write(FrameEvent(layout, 0, layer, layer, 0, 3));
    }
    writer.Write(ResultEvent({2}));
    return grpc::Status::OK;
  });
  const grpc::Status status = Generate(Request()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("num_layers is 2"));
  ExpectPoolFree();
}

TEST_F(WorkerServices, ADrainingWorkerTakesNothingNewAndFinishesWhatRuns) {
  absl::Notification started, release;
  SetPrefillScript(
      [&](grpc::ServerContext& context, const PrefillRequest& request, PrefillWriter& writer) {
        started.Notify();
        release.WaitForNotification();
        return SendAll(context, request, writer);
      });
  Reply running;
  std::thread caller([&] { running = Generate(Request()); });
  started.WaitForNotification();
  EXPECT_FALSE(service_->Drain(absl::Milliseconds(10)));
  EXPECT_EQ(Generate(Request()).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  release.Notify();
  EXPECT_TRUE(service_->Drain(absl::Seconds(30)));
  caller.join();
  EXPECT_TRUE(running.status.ok());
}

}  // namespace
}  // namespace prefilld::client
