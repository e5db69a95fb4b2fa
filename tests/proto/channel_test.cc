#include "proto/wire/channel.h"

#include <string>

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "prefill/v1/receiver.grpc.pb.h"

namespace prefilld::wire {
namespace {

namespace v1 = ::prefill::v1;

// A receiver that reads to the end and says nothing meanwhile.
class SilentReceiver final : public v1::KvReceiver::Service {
 public:
  grpc::Status Receive(grpc::ServerContext* context,
                       grpc::ServerReader<v1::ReceiveRequest>* requests,
                       v1::ReceiveResponse* response) override {
    v1::ReceiveRequest request;
    while (requests->Read(&request)) {
    }
    return grpc::Status::OK;
  }
};

// gRPC pings once a second at most, and its servers end a connection at the fourth ping.
TEST(OpenPushChannel, ALongLayerDoesNotEndThePushToAServerWithDefaultPingLimits) {
  SilentReceiver receiver;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&receiver);
  const auto server = builder.BuildAndStart();
  ASSERT_NE(server, nullptr);

  const auto channel = OpenPushChannel(absl::StrCat("127.0.0.1:", port),
                                       grpc::InsecureChannelCredentials(), absl::Seconds(1));
  const auto stub = v1::KvReceiver::NewStub(channel);
  grpc::ClientContext context;
  v1::ReceiveResponse response;
  const auto call = stub->Receive(&context, &response);
  ASSERT_TRUE(call->Write(v1::ReceiveRequest()));
  absl::SleepFor(absl::Seconds(7));
  call->WritesDone();
  const grpc::Status status = call->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
}

}  // namespace
}  // namespace prefilld::wire
