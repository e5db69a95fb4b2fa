// A decode worker's services over sockets, with a decoder without a model and a scripted prefill
// server.
#ifndef PREFILLD_TESTS_CLIENT_WORKER_FIXTURE_H_
#define PREFILLD_TESTS_CLIENT_WORKER_FIXTURE_H_

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/decode_worker/generate_service.h"
#include "client/decode_worker/receiver_service.h"
#include "client/decode_worker/worker_server.h"
#include "grpcpp/channel.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_context.h"
#include "gtest/gtest.h"
#include "prefill/v1/receiver.grpc.pb.h"
#include "tests/client/fake_decoder.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {

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

// The prefill server's script is one small transfer whose first token is 7. Its requests are kept.
class WorkerServices : public ::testing::Test {
 protected:
  WorkerServices()
      : prefill_server_([this](grpc::ServerContext& context, const PrefillRequest& request,
                               PrefillWriter& writer) {
          ScriptedServer::PrefillScript script;
          {
            absl::MutexLock lock(&mu_);
            last_request_ = request;
            script = prefill_script_;
          }
          return script(context, request, writer);
        }) {
    options_.listen = "127.0.0.1:0";
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
                                                               .metrics = &metrics_},
                                                 arrivals_);
    receiver_ = std::make_unique<ReceiverService>(PushSurroundings{.transfers = &transfers_,
                                                                   .open_timeout = kOpenTimeout,
                                                                   .metrics = &metrics_,
                                                                   .arrivals = &arrivals_});
    listener_ = *StartWorkerServer(options_, decoder_.config(), *service_, *receiver_, arrivals_);
    channel_ = grpc::CreateChannel(absl::StrCat("127.0.0.1:", listener_->port()),
                                   grpc::InsecureChannelCredentials());
    stub_ = DecodeService::NewStub(channel_);
    receiver_stub_ = KvReceiver::NewStub(channel_);
  }
  ~WorkerServices() override {
    listener_->Shutdown(absl::ZeroDuration());
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

  // Opens a pushed stream, sends `frames`, then the result, and closes the stream.
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

  // Runs `push` once the worker waits for transfer t1. Returns how the request ended.
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
    const absl::Time deadline = absl::Now() + absl::Seconds(20);
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

  // From now on the prefill server answers so.
  void SetPrefillScript(ScriptedServer::PrefillScript script) {
    absl::MutexLock lock(&mu_);
    prefill_script_ = std::move(script);
  }

  static constexpr absl::Duration kOpenTimeout = absl::Seconds(1);

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
  wire::Arrivals arrivals_{absl::Seconds(30)};
  std::unique_ptr<GenerateService> service_;
  std::unique_ptr<ReceiverService> receiver_;
  std::unique_ptr<wire::Listener> listener_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<DecodeService::Stub> stub_;
  std::unique_ptr<KvReceiver::Stub> receiver_stub_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_TESTS_CLIENT_WORKER_FIXTURE_H_
