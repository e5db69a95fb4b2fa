#include "proto/wire/arrivals.h"

#include <algorithm>
#include <functional>
#include <string>
#include <utility>

#include <grpcpp/server_context.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace prefilld::wire {
namespace {

using grpc::internal::MethodHandler;

// A machine that is busy may need a while for a request that was sent at once.
constexpr absl::Duration kLeastLimit = absl::Seconds(5);

// One call from its headers to its request. gRPC runs it as the tag of the read, once.
class Arrival : public grpc_completion_queue_functor {
 public:
  Arrival(Arrivals& arrivals, MethodHandler& handler, const MethodHandler::HandlerParameter& call)
      : arrivals_(arrivals), handler_(handler), call_(call) {
    functor_run = [](grpc_completion_queue_functor* self, int) {
      const std::unique_ptr<Arrival> arrival(static_cast<Arrival*>(self));
      arrival->GoOn();
    };
    inlineable = 0;
    number_ = arrivals_.Begin(grpc_call());
  }

  void Start() {
    grpc_op read = {};
    read.op = GRPC_OP_RECV_MESSAGE;
    read.data.recv_message.recv_message = &request_;
    if (grpc_call_start_batch(grpc_call(), &read, 1, this, nullptr) != GRPC_CALL_OK) {
      functor_run(this, 0);
    }
  }

 private:
  ::grpc_call* grpc_call() const { return call_.call->call(); }

  // A call that was broken off is run too, because the handler is who takes it apart. No service
  // hears of it then.
  void GoOn() {
    arrivals_.End(number_);
    const bool broken_off =
        request_ == nullptr && grpc_call_failed_before_recv_message(grpc_call()) != 0;
    grpc::Status status;
    void* data = nullptr;
    void* request = handler_.Deserialize(grpc_call(), request_, &status, &data);
    if (broken_off) status = grpc::Status::CANCELLED;
    handler_.RunHandler(
        {call_.call, call_.server_context, request, std::move(status), data, call_.call_requester});
  }

  Arrivals& arrivals_;
  MethodHandler& handler_;
  const MethodHandler::HandlerParameter call_;
  int64_t number_ = 0;
  grpc_byte_buffer* request_ = nullptr;  // the handler's from Deserialize on
};

class WatchedHandler final : public MethodHandler {
 public:
  WatchedHandler(Arrivals& arrivals, std::unique_ptr<MethodHandler> handler)
      : arrivals_(arrivals), handler_(std::move(handler)) {}

  void RunHandler(const HandlerParameter& call) override {
    (new Arrival(arrivals_, *handler_, call))->Start();
  }

 private:
  Arrivals& arrivals_;
  const std::unique_ptr<MethodHandler> handler_;
};

// It is a part of the call's context, which keeps the call.
class ReflectionCall final : public grpc::experimental::Interceptor {
 public:
  ReflectionCall(Arrivals& arrivals, grpc::ServerContextBase* context)
      : arrivals_(arrivals), context_(context) {}
  ~ReflectionCall() override { arrivals_.End(number_); }

  // The context has no call yet when this is made.
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      number_ = arrivals_.Begin(context_->c_call());
    }
    methods->Proceed();
  }

 private:
  Arrivals& arrivals_;
  grpc::ServerContextBase* const context_;
  int64_t number_ = 0;
};

class ReflectionCalls final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit ReflectionCalls(Arrivals& arrivals) : arrivals_(arrivals) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    if (!absl::StartsWith(info->method(), "/grpc.reflection.")) return nullptr;
    return new ReflectionCall(arrivals_, info->server_context());
  }

 private:
  Arrivals& arrivals_;
};

}  // namespace

absl::Duration Arrivals::LimitFor(absl::Duration stall_timeout) {
  return std::max(stall_timeout, kLeastLimit);
}

std::unique_ptr<MethodHandler> Arrivals::Watch(std::unique_ptr<MethodHandler> handler) {
  return std::make_unique<WatchedHandler>(*this, std::move(handler));
}

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> Arrivals::WatchReflection() {
  return std::make_unique<ReflectionCalls>(*this);
}

int64_t Arrivals::Begin(grpc_call* call) {
  const absl::Time until = absl::Now() + limit_;
  absl::MutexLock lock(&mu_);
  open_[++last_] = {.call = call, .until = until};
  return last_;
}

void Arrivals::End(int64_t number) {
  absl::MutexLock lock(&mu_);
  open_.erase(number);
}

// The lock keeps the calls alive meanwhile. Cancelling does not call back.
void Arrivals::EndLate(absl::Time now) {
  const std::string reason =
      absl::StrCat("the request did not arrive within ", absl::FormatDuration(limit_));
  absl::MutexLock lock(&mu_);
  for (auto& [number, entry] : open_) {
    if (now < entry.until) break;
    if (std::exchange(entry.ended, true)) continue;
    ++late_;
    grpc_call_cancel_with_status(entry.call, GRPC_STATUS_DEADLINE_EXCEEDED, reason.c_str(),
                                 nullptr);
  }
}

Arrivals::Counts Arrivals::counts() const {
  absl::MutexLock lock(&mu_);
  return {.open = static_cast<int64_t>(open_.size()), .late = late_};
}

}  // namespace prefilld::wire
