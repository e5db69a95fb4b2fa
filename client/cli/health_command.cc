#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "proto/status_macros.h"
#include "proto/wire/channel.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

constexpr char kCheck[] = "/grpc.health.v1.Health/Check";
constexpr uint32_t kServiceTag = 10;  // HealthCheckRequest.service, field 1 of wire type 2
constexpr absl::string_view kServing = "\x08\x01";  // HealthCheckResponse{status = SERVING}
constexpr absl::Duration kHealthTimeout = absl::Seconds(4);  // less than probes usually have

std::string RequestFor(const std::string& service) {
  std::string request;
  {
    google::protobuf::io::StringOutputStream bytes(&request);
    google::protobuf::io::CodedOutputStream out(&bytes);  // its end is what completes the string
    out.WriteTag(kServiceTag);
    out.WriteVarint32(static_cast<uint32_t>(service.size()));
    out.WriteString(service);
  }
  return request;
}

// Makes one call. Returns whether the service serves.
absl::StatusOr<bool> Check(grpc::GenericStub& stub, const std::string& service,
                           absl::Time deadline) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(deadline));
  grpc::CompletionQueue queue;
  const grpc::Slice request(RequestFor(service));
  const auto call = stub.PrepareUnaryCall(&context, kCheck, grpc::ByteBuffer(&request, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  PREFILLD_RETURN_IF_ERROR(wire::FromGrpc(status));
  grpc::Slice bytes;
  PREFILLD_RETURN_IF_ERROR(wire::FromGrpc(response.DumpToSingleSlice(&bytes)));
  return absl::string_view(reinterpret_cast<const char*>(bytes.begin()), bytes.size()) == kServing;
}

}  // namespace

absl::Status RunHealth(const CliOptions& options) {
  ChannelOptions where = options.channel;
  where.address = options.servers.front();
  PREFILLD_ASSIGN_OR_RETURN(const auto channel, wire::OpenChannel(where));
  grpc::GenericStub stub(channel);
  const absl::Time deadline = absl::Now() + std::min(options.timeout, kHealthTimeout);
  PREFILLD_ASSIGN_OR_RETURN(const bool serving, Check(stub, options.service, deadline));
  if (options.json) {
    std::printf("{\"serving\": %s}\n", serving ? "true" : "false");
  } else if (serving && !options.quiet) {
    std::printf("serving\n");
  }
  if (serving) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("'", options.service, "' is not serving"));
}

}  // namespace prefilld::client
