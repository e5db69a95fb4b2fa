#include "tests/integration/generate_client.h"

#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "prefill/v1/decode.grpc.pb.h"

namespace prefilld::integration {

using ::prefill::v1::DecodeService;
using ::prefill::v1::GenerateEvent;
using ::prefill::v1::GenerateRequest;

GenerateRequest DenseRequest(const std::vector<uint32_t>& prompt, uint32_t max_new_tokens) {
  GenerateRequest request;
  request.mutable_token_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_new_tokens(max_new_tokens);
  request.set_ignore_eos(true);
  request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
  return request;
}

Generation Generate(
    const std::string& worker_address, const GenerateRequest& request,
    const std::function<void(const GenerateEvent&, grpc::ClientContext&)>& on_event) {
  const auto stub = DecodeService::NewStub(
      grpc::CreateChannel(worker_address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  const auto stream = stub->Generate(&context, request);
  Generation generation;
  GenerateEvent event;
  while (stream->Read(&event)) {
    if (event.has_token()) generation.tokens.push_back(event.token().token().token_id());
    if (event.has_result()) generation.result = event.result();
    if (on_event) on_event(event, context);
  }
  generation.status = stream->Finish();
  return generation;
}

}  // namespace prefilld::integration
