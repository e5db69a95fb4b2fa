// A server whose requests outlive their connections, and the calls that tests make about one.
#ifndef PREFILLD_TESTS_SERVER_RESUMPTION_FIXTURE_H_
#define PREFILLD_TESTS_SERVER_RESUMPTION_FIXTURE_H_

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/create_channel.h>

#include "prefill/v1/resumption.grpc.pb.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {

inline constexpr char kKey[] = "0123456789abcdef0123456789abcdef";
inline constexpr char kId[] = "resumed";

inline v1::PrefillRequest Resumable(int num_tokens, uint32_t num_lanes = 1) {
  v1::PrefillRequest request = PromptOf(num_tokens, kId);
  request.set_resume_key(kKey);
  request.set_num_lanes(num_lanes);
  return request;
}

template <typename Message>
Message Named() {
  Message message;
  message.set_request_id(kId);
  message.set_resume_key(kKey);
  return message;
}

class Resumption : public ServerFixture {
 protected:
  std::unique_ptr<v1::ResumptionService::Stub> NewResumptionStub() const {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return v1::ResumptionService::NewStub(
        grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments));
  }

  struct Resumed {
    explicit Resumed(v1::ResumptionService::Stub& stub, const v1::ResumeRequest& request)
        : reader(stub.Resume(&context, request)) {}
    ~Resumed() { context.TryCancel(); }
    StreamContents Rest() {
      StreamContents contents;
      v1::PrefillEvent event;
      while (reader->Read(&event)) contents.events.push_back(event);
      contents.status = reader->Finish();
      return contents;
    }
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::PrefillEvent>> reader;
  };

  static v1::ResumeRequest From(uint64_t received, uint32_t lane = 0) {
    auto request = Named<v1::ResumeRequest>();
    request.set_lane(lane);
    request.set_received(received);
    return request;
  }

  grpc::Status Acknowledge(uint32_t lane, uint64_t received, std::vector<uint64_t> damaged = {},
                           bool complete = false) const {
    auto request = Named<v1::AcknowledgeRequest>();
    v1::LaneReceipt& receipt = *request.add_lanes();
    receipt.set_lane(lane);
    receipt.set_received(received);
    receipt.mutable_damaged()->Assign(damaged.begin(), damaged.end());
    request.set_complete(complete);
    grpc::ClientContext context;
    v1::AcknowledgeResponse response;
    return NewResumptionStub()->Acknowledge(&context, request, &response);
  }

  grpc::Status CancelRequest() const {
    grpc::ClientContext context;
    v1::CancelResponse response;
    return NewResumptionStub()->Cancel(&context, Named<v1::CancelRequest>(), &response);
  }

  bool Waits() {
    return Eventually([this] { return Metric("prefilld_waiting_for_consumer") == 1; });
  }
  double Refusals(const std::string& cause) const {
    return Metric("prefilld_refusals_total{cause=\"" + cause + "\"}");
  }
  double Ended(const std::string& outcome) const {
    return Metric("prefilld_requests_total{outcome=\"" + outcome + "\"}");
  }
};

}  // namespace prefilld::server

#endif  // PREFILLD_TESTS_SERVER_RESUMPTION_FIXTURE_H_
