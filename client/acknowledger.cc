#include "client/acknowledger.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/client_callback.h"
#include "prefill/v1/resumption.grpc.pb.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::AcknowledgeRequest;
using ::prefill::v1::AcknowledgeResponse;
using ::prefill::v1::CancelRequest;
using ::prefill::v1::CancelResponse;
using ::prefill::v1::LaneReceipt;
using ::prefill::v1::ResumptionService;

// A client that goes waits for the calls under way. An acknowledgement that takes longer, because
// there is no connection or the server has many calls to read, is made again as long as it is
// wanted.
constexpr absl::Duration kPatience = absl::Seconds(3);
constexpr absl::Duration kMoment = absl::Milliseconds(20);
constexpr int kMaxDamaged = 64;  // of a lane, in one call

// A server that reads too many calls at once may end any of them with RESOURCE_EXHAUSTED.
bool MayBeTheConnections(const absl::Status& status) {
  return absl::IsResourceExhausted(status) || absl::IsUnavailable(status) ||
         absl::IsDeadlineExceeded(status) || absl::IsCancelled(status) ||
         absl::IsInternal(status) || absl::IsUnknown(status);
}

template <typename Request>
Request NewRequest(const ResumableRequest& of) {
  Request request;
  request.set_request_id(of.id);
  request.set_resume_key(of.resume_key);
  request.set_receiver(of.receiver);
  return request;
}

// Older news that were not told are told with the new ones.
void Merge(const LaneReceipt& older, LaneReceipt& newer) {
  newer.set_lane(older.lane());
  newer.set_received(std::max(newer.received(), older.received()));
  for (const uint64_t frame : older.damaged()) {
    if (newer.damaged_size() < kMaxDamaged) newer.add_damaged(frame);
  }
}

}  // namespace

void SmallCalls::Begin() {
  absl::MutexLock lock(&mu_);
  ++open_;
}

void SmallCalls::End() {
  absl::MutexLock lock(&mu_);
  --open_;
}

void SmallCalls::AwaitIdle() {
  absl::MutexLock lock(&mu_);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return open_ == 0; };
  mu_.Await(absl::Condition(&idle));
}

// Owns itself until gRPC is done with it.
template <typename Request, typename Response>
class Acknowledger::SmallCall final : public grpc::ClientUnaryReactor {
 public:
  using Done = std::function<void(const Request&, const absl::Status&)>;
  using Method = void (ResumptionService::Stub::async::*)(grpc::ClientContext*, const Request*,
                                                          Response*, grpc::ClientUnaryReactor*);

  static void Start(std::shared_ptr<SmallCalls> calls,
                    const std::shared_ptr<grpc::Channel>& channel, Method method, Request request,
                    bool awaits_connection, Done done) {
    auto* call = new SmallCall(std::move(calls), channel, std::move(request), std::move(done));
    call->context_.set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
    call->context_.set_wait_for_ready(awaits_connection);
    (call->stub_.async()->*method)(&call->context_, &call->request_, &call->response_, call);
    call->StartCall();
  }

 private:
  SmallCall(std::shared_ptr<SmallCalls> calls, const std::shared_ptr<grpc::Channel>& channel,
            Request request, Done done)
      : calls_(std::move(calls)),
        stub_(channel),
        request_(std::move(request)),
        done_(std::move(done)) {
    calls_->Begin();
  }

  void OnDone(const grpc::Status& status) override {
    if (done_ != nullptr) done_(request_, wire::FromGrpc(status));
    const std::shared_ptr<SmallCalls> calls = calls_;
    delete this;
    calls->End();
  }

  const std::shared_ptr<SmallCalls> calls_;
  ResumptionService::Stub stub_;
  grpc::ClientContext context_;
  const Request request_;
  Response response_;
  Done done_;
};

Acknowledger::Acknowledger(std::shared_ptr<SmallCalls> calls,
                           std::shared_ptr<grpc::Channel> channel, ResumableRequest request)
    : calls_(std::move(calls)), channel_(std::move(channel)), request_(std::move(request)) {}

void Acknowledger::Note(uint32_t lane, uint64_t received, std::optional<uint64_t> damaged) {
  LaneReceipt receipt;
  receipt.set_lane(lane);
  receipt.set_received(received);
  if (damaged.has_value()) receipt.add_damaged(*damaged);
  {
    absl::MutexLock lock(&mu_);
    Merge(receipt, news_[lane]);
  }
  SendIfDue();
}

std::optional<AcknowledgeRequest> Acknowledger::TakeNews() {
  absl::MutexLock lock(&mu_);
  if (closed_ || under_way_ || news_.empty()) return std::nullopt;
  under_way_ = true;
  auto request = NewRequest<AcknowledgeRequest>(request_);
  for (auto& [lane, receipt] : news_) *request.add_lanes() = std::move(receipt);
  news_.clear();
  return request;
}

void Acknowledger::SendIfDue() {
  std::optional<AcknowledgeRequest> request = TakeNews();
  if (!request.has_value()) return;
  using Call = SmallCall<AcknowledgeRequest, AcknowledgeResponse>;
  Call::Start(
      calls_, channel_, &ResumptionService::Stub::async::Acknowledge, *std::move(request),
      /*awaits_connection=*/true,
      [self = shared_from_this()](const AcknowledgeRequest& sent, const absl::Status& status) {
        self->OnAnswer(sent, status);
      });
}

void Acknowledger::OnAnswer(const AcknowledgeRequest& sent, const absl::Status& status) {
  {
    absl::MutexLock lock(&mu_);
    if (MayBeTheConnections(status)) {
      for (const LaneReceipt& receipt : sent.lanes()) Merge(receipt, news_[receipt.lane()]);
      if (!closed_) return SendLater();
    } else if (!status.ok()) {
      closed_ = true;  // the streams tell why
    }
    under_way_ = false;
  }
  SendIfDue();
}

// The moment counts as a call, since it owns a share of the channel as long as it lasts.
void Acknowledger::SendLater() {
  calls_->Begin();
  moment_ = std::make_unique<grpc::Alarm>();
  moment_->Set(absl::ToChronoTime(absl::Now() + kMoment),
               [self = shared_from_this(), calls = calls_](bool) mutable {
                 {
                   absl::MutexLock lock(&self->mu_);
                   self->under_way_ = false;
                 }
                 self->SendIfDue();
                 self.reset();
                 calls->End();
               });
}

void Acknowledger::Close() {
  absl::MutexLock lock(&mu_);
  closed_ = true;
  if (moment_ != nullptr) moment_->Cancel();
}

void Acknowledger::Complete() {
  auto request = NewRequest<AcknowledgeRequest>(request_);
  request.set_complete(true);
  Close();
  using Call = SmallCall<AcknowledgeRequest, AcknowledgeResponse>;
  Call::Start(calls_, channel_, &ResumptionService::Stub::async::Acknowledge, std::move(request),
              /*awaits_connection=*/false, nullptr);
}

void Acknowledger::Cancel() {
  Close();
  using Call = SmallCall<CancelRequest, CancelResponse>;
  Call::Start(calls_, channel_, &ResumptionService::Stub::async::Cancel,
              NewRequest<CancelRequest>(request_), /*awaits_connection=*/false, nullptr);
}

}  // namespace prefilld::client
