#include "client/decode_worker/generate_service.h"

#include <atomic>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cancellation.h"
#include "client/decode_worker/spans.h"
#include "grpc/grpc.h"
#include "proto/process/log.h"
#include "proto/wire/grpc_status.h"
#include "proto/wire/request_id.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::GenerateEvent;
using ::prefill::v1::GenerateRequest;

absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

std::string NewRequestId() {
  static const int64_t start = absl::ToUnixMicros(absl::Now());
  static std::atomic<uint64_t> count = 0;
  return absl::StrFormat("generate-%x-%d", start, ++count);
}

// No field holds anything of the prompt. Of trace_id to total_ms a collector makes a span
// (deploy/security.md).
void Log(const CallFacts& facts, const std::string& peer, const GenerateRequest& request,
         std::optional<absl::Time> first_token_at, const absl::Status& status) {
  const absl::Time now = absl::Now();
  process::LogFields fields = {{"request_id", wire::ShownId(facts.request_id)},
                               {"prompt_tokens", int64_t{request.token_ids_size()}},
                               {"max_new_tokens", int64_t{request.max_new_tokens()}},
                               {"status", absl::StatusCodeToString(status.code())},
                               {"peer", peer}};
  if (first_token_at.has_value()) {
    fields.emplace_back("prefill_ms", absl::ToDoubleMilliseconds(*first_token_at - facts.arrival));
    fields.emplace_back("decode_ms", absl::ToDoubleMilliseconds(now - *first_token_at));
  }
  fields.emplace_back("total_ms", absl::ToDoubleMilliseconds(now - facts.arrival));
  AddSpan(facts.trace, facts.arrival, fields);
  if (!status.ok()) fields.emplace_back("reason", wire::ShownReason(status.message()));
  process::LogEvent(process::LogLevel::kInfo, "generate", fields);
}

}  // namespace

// One call, with gRPC's callbacks on one side and the generating thread on the other. It deletes
// itself when gRPC is done with it, which is after Finish and so after the thread's last use of it.
class GenerateService::Call : public grpc::ServerWriteReactor<GenerateEvent>, public EventWriter {
 public:
  // Answers a request that is refused.
  explicit Call(const absl::Status& refusal) { Finish(wire::ToGrpc(refusal)); }

  Call(GenerateService* service, grpc::CallbackServerContext* context,
       const GenerateRequest* request)
      : context_(context),
        stall_timeout_(service->worker_.options->stall_timeout),
        facts_{request->request_id().empty() ? NewRequestId() : request->request_id(), absl::Now(),
               DeadlineOf(*context), TakeTrace(*context, *service->worker_.metrics)} {
    context->AddTrailingMetadata(wire::kTraceResponseKey, facts_.trace.traceparent());
    std::thread([this, service, request] { Run(service, *request); }).detach();
  }

  absl::Status Write(const GenerateEvent& event) override {
    if (cancellation_.cancelled()) return absl::CancelledError("cancelled");
    {
      absl::MutexLock lock(&mu_);
      writing_ = true;
    }
    if (event.has_token() && !first_token_at_.has_value()) first_token_at_ = absl::Now();
    StartWrite(&event);
    {
      absl::MutexLock lock(&mu_);
      if (mu_.AwaitWithTimeout(absl::Condition(this, &Call::WriteEnded), stall_timeout_)) {
        return broken_ ? absl::CancelledError("the caller is gone") : absl::OkStatus();
      }
    }
    return BreakOff();
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    broken_ = broken_ || !ok;
  }
  void OnCancel() override { cancellation_.Cancel(); }
  void OnDone() override { delete this; }

 private:
  // Ends a call whose caller takes nothing. Finish would wait behind the event under way.
  absl::Status BreakOff() {
    const absl::Status stalled = absl::AbortedError(
        absl::StrCat("the caller took nothing for ", absl::FormatDuration(stall_timeout_)));
    grpc_call_cancel_with_status(context_->c_call(), GRPC_STATUS_ABORTED,
                                 std::string(stalled.message()).c_str(), nullptr);
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Call::WriteEnded));
    return stalled;
  }

  bool WriteEnded() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !writing_; }

  // The service's destructor waits for Leave. This call may be gone after Finish.
  void Run(GenerateService* service, const GenerateRequest& request) {
    const WorkerContext& worker = service->worker_;
    worker.metrics->RequestStarted();
    const absl::Status status = client::Generate(worker, request, facts_, cancellation_, *this);
    worker.metrics->RequestEnded(status);
    Log(facts_, context_->peer(), request, first_token_at_, status);
    Finish(wire::ToGrpc(status));
    service->Leave();
  }

  grpc::CallbackServerContext* const context_ = nullptr;
  const absl::Duration stall_timeout_;
  const CallFacts facts_;
  Cancellation cancellation_;
  std::optional<absl::Time> first_token_at_;  // of the generating thread

  absl::Mutex mu_;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool broken_ ABSL_GUARDED_BY(mu_) = false;
};

GenerateService::GenerateService(const WorkerContext& worker, wire::Arrivals& arrivals)
    : worker_(worker) {
  using Streaming = grpc::internal::CallbackServerStreamingHandler<GenerateRequest, GenerateEvent>;
  WatchArrival(
      arrivals, 0,
      new Streaming([this](grpc::CallbackServerContext* context, const GenerateRequest* request) {
        return Generate(context, request);
      }));
}

GenerateService::~GenerateService() { Drain(absl::InfiniteDuration()); }

grpc::ServerWriteReactor<GenerateEvent>* GenerateService::Generate(
    grpc::CallbackServerContext* context, const GenerateRequest* request) {
  if (absl::Status admitted = Admit(); !admitted.ok()) return new Call(admitted);
  return new Call(this, context, request);
}

absl::Status GenerateService::Admit() {
  absl::MutexLock lock(&mu_);
  if (draining_) return absl::UnavailableError("the decode worker is draining");
  if (running_ >= worker_.options->max_requests) {
    return absl::ResourceExhaustedError(
        absl::StrCat(running_, " requests are running, the worker's limit"));
  }
  ++running_;
  return absl::OkStatus();
}

void GenerateService::Leave() {
  absl::MutexLock lock(&mu_);
  --running_;
}

bool GenerateService::Drain(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  draining_ = true;
  const auto empty = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return running_ == 0; };
  return mu_.AwaitWithTimeout(absl::Condition(&empty), timeout);
}

}  // namespace prefilld::client
