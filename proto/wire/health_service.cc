#include "proto/wire/health_service.h"

#include <memory>
#include <optional>
#include <utility>

#include <google/protobuf/io/coded_stream.h>
#include <grpcpp/impl/codegen/server_callback_handlers.h>
#include <grpcpp/support/proto_buffer_reader.h>

namespace prefilld::wire {
namespace {

using grpc::ByteBuffer;
using grpc::internal::RpcMethod;
using grpc::internal::RpcServiceMethod;

constexpr size_t kMaxNameBytes = 200;
constexpr uint32_t kServiceTag = 10;  // HealthCheckRequest.service, field 1 of wire type 2
constexpr char kStatusTag = 8;        // HealthCheckResponse.status, field 1 of wire type 0

// Returns the service that a HealthCheckRequest names; nullopt if it is not one.
std::optional<std::string> NameIn(const ByteBuffer& request) {
  std::string name;
  ByteBuffer bytes(request);
  if (bytes.Length() == 0) return name;
  grpc::ProtoBufferReader reader(&bytes);
  google::protobuf::io::CodedInputStream input(&reader);
  uint32_t size = 0;
  if (input.ReadTag() != kServiceTag || !input.ReadVarint32(&size) || size > kMaxNameBytes ||
      !input.ReadString(&name, static_cast<int>(size))) {
    return std::nullopt;
  }
  return name;
}

grpc::Status NotARequest() {
  return {grpc::StatusCode::INVALID_ARGUMENT,
          "the request is not a valid grpc.health.v1.HealthCheckRequest"};
}

}  // namespace

// Everything but its name is guarded by the service's lock. It deletes itself when gRPC is done.
class HealthService::WatchCall final : public grpc::ServerWriteReactor<ByteBuffer> {
 public:
  WatchCall(HealthService& service, std::optional<std::string> name)
      : service_(service), name_(std::move(name)) {
    if (!name_.has_value()) {
      Finish(NotARequest());
      return;
    }
    absl::MutexLock lock(&service_.mu_);
    service_.watches_.insert(this);
    Update();
  }

  // Sends the status unless the caller knows it. It needs the service's lock, which the analysis
  // of locks cannot see from here.
  void Update() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (writing_ || finished_) return;
    const Status status = service_.StatusOf(*name_);
    if (sent_ == status) return;
    sent_ = status;
    writing_ = true;
    response_ = Response(status);
    StartWrite(&response_);
  }

 private:
  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&service_.mu_);
    writing_ = false;
    if (ok) Update();
  }

  void OnCancel() override {
    if (!name_.has_value()) return;
    {
      absl::MutexLock lock(&service_.mu_);
      finished_ = true;
    }
    Finish(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    {
      absl::MutexLock lock(&service_.mu_);
      service_.watches_.erase(this);
    }
    delete this;
  }

  HealthService& service_;
  const std::optional<std::string> name_;
  std::optional<Status> sent_;
  ByteBuffer response_;  // belongs to gRPC while writing_
  bool writing_ = false;
  bool finished_ = false;
};

HealthService::HealthService(Arrivals& arrivals) {
  const auto add = [&](int index, const char* name, grpc::internal::MethodHandler* handler) {
    AddMethod(new RpcServiceMethod(name, RpcMethod::BIDI_STREAMING, nullptr));
    MarkMethodRawCallback(
        index, arrivals.Watch(std::unique_ptr<grpc::internal::MethodHandler>(handler)).release());
  };
  add(0, "/grpc.health.v1.Health/Check",
      new grpc::internal::CallbackUnaryHandler<ByteBuffer, ByteBuffer>(
          [this](grpc::CallbackServerContext* context, const ByteBuffer* request,
                 ByteBuffer* response) { return Check(context, request, response); }));
  add(1, "/grpc.health.v1.Health/Watch",
      new grpc::internal::CallbackServerStreamingHandler<ByteBuffer, ByteBuffer>(
          [this](grpc::CallbackServerContext*, const ByteBuffer* request) {
            return Watch(request);
          }));
  absl::MutexLock lock(&mu_);
  statuses_[""] = Status::kServing;
}

ByteBuffer HealthService::Response(Status status) {
  const char bytes[] = {kStatusTag, static_cast<char>(status)};
  const grpc::Slice slice(bytes, sizeof bytes);
  return {&slice, 1};
}

grpc::ServerUnaryReactor* HealthService::Check(grpc::CallbackServerContext* context,
                                               const ByteBuffer* request, ByteBuffer* response) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const std::optional<std::string> name = NameIn(*request);
  if (!name.has_value()) {
    reactor->Finish(NotARequest());
    return reactor;
  }
  Status status = Status::kServiceUnknown;
  {
    absl::MutexLock lock(&mu_);
    status = StatusOf(*name);
  }
  if (status == Status::kServiceUnknown) {
    reactor->Finish({grpc::StatusCode::NOT_FOUND, "service name unknown"});
    return reactor;
  }
  *response = Response(status);
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerWriteReactor<ByteBuffer>* HealthService::Watch(const ByteBuffer* request) {
  return new WatchCall(*this, NameIn(*request));
}

HealthService::Status HealthService::StatusOf(const std::string& name) const {
  const auto found = statuses_.find(name);
  return found == statuses_.end() ? Status::kServiceUnknown : found->second;
}

void HealthService::SetServingStatus(const std::string& name, bool serving) {
  absl::MutexLock lock(&mu_);
  statuses_[name] = serving ? Status::kServing : Status::kNotServing;
  for (WatchCall* watch : watches_) watch->Update();
}

void HealthService::SetServingStatus(bool serving) {
  absl::MutexLock lock(&mu_);
  for (auto& [name, status] : statuses_) {
    status = serving ? Status::kServing : Status::kNotServing;
  }
  for (WatchCall* watch : watches_) watch->Update();
}

}  // namespace prefilld::wire
