#ifndef PREFILLD_TESTS_INTEGRATION_GENERATE_CLIENT_H_
#define PREFILLD_TESTS_INTEGRATION_GENERATE_CLIENT_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "grpcpp/client_context.h"
#include "grpcpp/support/status.h"
#include "prefill/v1/decode.pb.h"

namespace prefilld::integration {

::prefill::v1::GenerateRequest DenseRequest(const std::vector<uint32_t>& prompt,
                                            uint32_t max_new_tokens);

struct Generation {
  std::vector<uint32_t> tokens;
  ::prefill::v1::GenerateResult result;
  grpc::Status status;
};

// Makes one Generate call to a worker. `on_event` sees every event as it comes.
Generation Generate(
    const std::string& worker_address, const ::prefill::v1::GenerateRequest& request,
    const std::function<void(const ::prefill::v1::GenerateEvent&, grpc::ClientContext&)>& on_event =
        nullptr);

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_GENERATE_CLIENT_H_
