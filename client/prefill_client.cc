#include "client/prefill_client.h"

#include <algorithm>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/raw_stream.h"
#include "client/transfer_check.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "prefill/v1/prefill.grpc.pb.h"
#include "proto/status_macros.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::Accepted;
using ::prefill::v1::AttachLaneRequest;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;
using ::prefill::v1::PrefillService;
using ::prefill::v1::ServerInfo;

constexpr uint32_t kMaxLanes = 16;
constexpr char kPrefillMethod[] = "/prefill.v1.PrefillService/Prefill";
constexpr char kAttachLaneMethod[] = "/prefill.v1.PrefillService/AttachLane";

// The result must have as many log-probabilities as were asked for, wherever the cache went.
absl::Status CheckLogprobs(const PrefillRequest& request, const PrefillResult& result) {
  const int due = request.prompt_logprobs() ? request.token_ids_size() - 1 : 0;
  for (const auto& [field, values] : {std::pair("prompt_logprobs", &result.prompt_logprobs()),
                                      std::pair("best_logprobs", &result.best_logprobs())}) {
    if (values->size() == due) continue;
    return absl::DataLossError(
        absl::StrCat(values->size(), " ", field, " arrived; ", due, " are due"));
  }
  return absl::OkStatus();
}

// Compared with what gRPC carries as text; it would end the process over anything else.
absl::Status CheckMetadata(const Metadata& metadata) {
  for (const auto& [key, value] : metadata) {
    const bool key_is_legal = !key.empty() && std::all_of(key.begin(), key.end(), [](char c) {
      return absl::ascii_islower(c) || absl::ascii_isdigit(c) || c == '-' || c == '_' || c == '.';
    });
    if (!key_is_legal || absl::EndsWith(key, "-bin") || absl::StartsWith(key, "grpc-")) {
      return absl::InvalidArgumentError(
          absl::StrCat("metadata key '", absl::CHexEscape(key),
                       "'; of a-z 0-9 - _ . without grpc- before or -bin behind them"));
    }
    if (!std::all_of(value.begin(), value.end(), absl::ascii_isprint)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the value of metadata ", key, " is not printable ASCII"));
    }
  }
  return absl::OkStatus();
}

// One Prefill call. The calling thread reads lane 0, which carries everything except frames of
// other lanes. Each further lane has a thread that lives from Accepted to the end of its stream.
class PrefillCall {
 public:
  // `options` must outlive the call.
  PrefillCall(const PrefillRequest& request, KvSink& sink, const PrefillCallOptions& options,
              const std::vector<std::shared_ptr<grpc::Channel>>& channels)
      : request_(request), sink_(sink), deadline_(options.deadline), metadata_(options.metadata) {
    for (const auto& channel : channels) streams_.push_back(std::make_unique<RawStream>(channel));
  }

  absl::StatusOr<PrefillResult> Run() {
    streams_[0]->Start(kPrefillMethod, request_, deadline_, metadata_);
    ReadStream(0);
    if (status().ok() && !result_) Fail(absl::DataLossError("the stream ended without a result"));
    for (std::thread& thread : lane_threads_) thread.join();
    PREFILLD_RETURN_IF_ERROR(status());
    if (!request_.has_deliver_to()) {
      PREFILLD_RETURN_IF_ERROR(check_->Finish(*result_));
    }
    PREFILLD_RETURN_IF_ERROR(CheckLogprobs(request_, *result_));
    return *std::move(result_);
  }

  // Tells whether the server took the request. May be called when Run has returned.
  bool accepted() const { return check_ != nullptr; }

  // Ends every lane, and keeps the first reason. Thread-safe.
  void Fail(absl::Status reason) {
    {
      absl::MutexLock lock(&mu_);
      if (!status_.ok()) return;
      status_ = std::move(reason);
    }
    for (const auto& stream : streams_) stream->Cancel();
  }

 private:
  absl::Status status() {
    absl::MutexLock lock(&mu_);
    return status_;
  }

  void ReadStream(uint32_t lane) {
    RawStream& stream = *streams_[lane];
    grpc::ByteBuffer message;
    while (stream.Read(message)) {
      if (absl::Status taken = Take(lane, message); !taken.ok()) return Fail(std::move(taken));
    }
    absl::Status ended = stream.Finish();
    // Our own cancellation sets its reason before, so this one comes from a server that shuts down.
    if (absl::IsCancelled(ended)) ended = absl::UnavailableError("the server cancelled the call");
    if (!ended.ok()) Fail(std::move(ended));
  }

  absl::Status Take(uint32_t lane, grpc::ByteBuffer& message) {
    PREFILLD_ASSIGN_OR_RETURN(const auto frame, wire::ParseFrame(message));
    if (frame.has_value()) return TakeFrame(lane, *frame);
    PrefillEvent event;
    PREFILLD_RETURN_IF_ERROR(wire::ParseMessage(message, event));
    if (event.has_kv_frame()) return TakeFrame(lane, wire::MakeReceivedFrame(event.kv_frame()));
    if (lane != 0) {
      return absl::DataLossError(absl::StrCat("lane ", lane, " carries more than frames"));
    }
    return TakeEvent(std::move(event));
  }

  absl::Status TakeFrame(uint32_t lane, const wire::ReceivedFrame& frame) {
    if (check_ == nullptr) return absl::DataLossError("a frame came before Accepted");
    if (request_.has_deliver_to()) {
      return absl::DataLossError("a frame came here though the cache is delivered elsewhere");
    }
    PREFILLD_RETURN_IF_ERROR(check_->Check(lane, frame));
    return sink_.OnFrame(frame);
  }

  absl::Status TakeEvent(PrefillEvent event) {
    if (event.has_accepted() == (check_ != nullptr)) {
      return absl::DataLossError(check_ == nullptr ? "the stream does not begin with Accepted"
                                                   : "Accepted came twice");
    }
    if (result_) return absl::DataLossError("an event came after the result");
    switch (event.event_case()) {
      case PrefillEvent::kAccepted:
        return TakeAccepted(event.accepted());
      case PrefillEvent::kProgress:
        return sink_.OnProgress(event.progress());
      case PrefillEvent::kResult:
        result_ = std::move(*event.mutable_result());
        return absl::OkStatus();
      default:
        return absl::OkStatus();  // an event of a later version
    }
  }

  absl::Status TakeAccepted(const Accepted& accepted) {
    const ExpectedTransfer expected = {request_.layout(),
                                       static_cast<uint32_t>(request_.token_ids_size()),
                                       request_.model_fingerprint()};
    PREFILLD_RETURN_IF_ERROR(CheckLayout(accepted.layout(), expected));
    const uint32_t num_lanes = accepted.num_lanes();
    if (num_lanes < 1 || num_lanes > streams_.size()) {
      return absl::FailedPreconditionError(
          absl::StrCat("num_lanes is ", num_lanes, ", asked for were ", streams_.size()));
    }
    check_ = std::make_unique<TransferCheck>(accepted.layout(), num_lanes);
    PREFILLD_RETURN_IF_ERROR(sink_.OnAccepted(accepted));
    for (uint32_t lane = 1; lane < num_lanes; ++lane) {
      lane_threads_.emplace_back(
          [this, lane, id = accepted.request_id(), key = accepted.lane_key()] {
            AttachLaneRequest attach;
            attach.set_request_id(id);
            attach.set_lane(lane);
            attach.set_lane_key(key);
            streams_[lane]->Start(kAttachLaneMethod, attach, deadline_);
            ReadStream(lane);
          });
    }
    return absl::OkStatus();
  }

  const PrefillRequest& request_;
  KvSink& sink_;
  const absl::Time deadline_;
  const Metadata& metadata_;
  std::vector<std::unique_ptr<RawStream>> streams_;  // by lane

  // Set on Accepted, before the lanes' threads start.
  std::unique_ptr<TransferCheck> check_;
  std::vector<std::thread> lane_threads_;
  std::optional<PrefillResult> result_;

  absl::Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillClient>> PrefillClient::Create(
    const ChannelOptions& options) {
  return Create(options, {options.address});
}

absl::StatusOr<std::unique_ptr<PrefillClient>> PrefillClient::Create(
    const ChannelOptions& options, const std::vector<std::string>& addresses) {
  if (addresses.empty()) return absl::InvalidArgumentError("no address of a server");
  PREFILLD_ASSIGN_OR_RETURN(const auto credentials, wire::MakeChannelCredentials(options.tls));
  std::unique_ptr<PrefillClient> client(new PrefillClient);
  for (const std::string& address : addresses) {
    ChannelOptions server = options;
    server.address = address;
    client->servers_.push_back(std::make_unique<ServerChannels>(server, credentials));
  }
  return client;
}

std::vector<ServerChannels*> PrefillClient::InTurn() {
  const size_t first = turn_.fetch_add(1, std::memory_order_relaxed) % servers_.size();
  std::vector<ServerChannels*> order;
  for (size_t i = 0; i < servers_.size(); ++i) {
    order.push_back(servers_[(first + i) % servers_.size()].get());
  }
  std::stable_partition(order.begin(), order.end(),
                        [](ServerChannels* server) { return server->MayBeReached(); });
  return order;
}

absl::StatusOr<ServerInfo> PrefillClient::GetServerInfo(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  absl::Status status;
  for (ServerChannels* server : InTurn()) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(deadline));
    ServerInfo info;
    const auto stub = PrefillService::NewStub(server->OfLanes(1).front());
    status = wire::FromGrpc(stub->GetServerInfo(&context, {}, &info));
    if (status.ok()) return info;
    if (!absl::IsUnavailable(status)) break;
    server->Renew();
  }
  return status;
}

absl::StatusOr<PrefillResult> PrefillClient::Prefill(const PrefillRequest& request, KvSink& sink,
                                                     const PrefillCallOptions& options) {
  if (request.num_lanes() > kMaxLanes) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_lanes ", request.num_lanes(), ", allowed: 1 to ", kMaxLanes));
  }
  PREFILLD_RETURN_IF_ERROR(CheckMetadata(options.metadata));
  absl::StatusOr<PrefillResult> result;
  for (ServerChannels* server : InTurn()) {
    const auto channels = server->OfLanes(std::max(request.num_lanes(), 1u));
    PrefillCall call(request, sink, options, channels);
    {
      CancelHook hook(options.cancellation,
                      [&call] { call.Fail(absl::CancelledError("cancelled by the caller")); });
      result = call.Run();
    }
    if (!absl::IsUnavailable(result.status())) break;
    server->Renew();
    if (call.accepted()) break;
  }
  return result;
}

}  // namespace prefilld::client
