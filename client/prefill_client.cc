#include "client/prefill_client.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/async_call.h"
#include "client/raw_stream.h"
#include "client/reception.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "prefill/v1/prefill.grpc.pb.h"
#include "proto/status_macros.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::Accepted;
using ::prefill::v1::AttachLaneRequest;
using ::prefill::v1::AttachReceiverRequest;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;
using ::prefill::v1::PrefillService;
using ::prefill::v1::ServerInfo;

constexpr uint32_t kMaxLanes = 16;
constexpr char kAttachReceiverMethod[] = "/prefill.v1.PrefillService/AttachReceiver";
constexpr char kAttachLaneMethod[] = "/prefill.v1.PrefillService/AttachLane";

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

// One Prefill or AttachReceiver call that blocks. The calling thread reads lane 0, which carries
// everything except frames of other lanes. Each further lane has a thread that lives from Accepted
// to the end of its stream.
class PrefillCall {
 public:
  // `request` and `options` must outlive the call.
  template <typename Request>
  PrefillCall(const char* method, const Request& request, KvSink& sink,
              const PrefillCallOptions& options,
              const std::vector<std::shared_ptr<grpc::Channel>>& channels)
      : method_(method),
        request_(request),
        deadline_(options.deadline),
        metadata_(options.metadata),
        reception_(request, sink, static_cast<uint32_t>(channels.size())) {
    for (const auto& channel : channels) streams_.push_back(std::make_unique<RawStream>(channel));
  }

  absl::StatusOr<PrefillResult> Run() {
    streams_[0]->Start(method_, request_, deadline_, metadata_);
    ReadStream(0);
    for (std::thread& thread : lane_threads_) thread.join();
    PREFILLD_RETURN_IF_ERROR(status());
    return reception_.Finish();
  }

  // Tells whether the server took the request. May be called when Run has returned.
  bool accepted() const { return reception_.accepted().has_value(); }

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
      if (absl::Status taken = reception_.Take(lane, message); !taken.ok()) {
        return Fail(std::move(taken));
      }
      if (lane == 0 && lane_threads_.empty() && accepted()) ReadOtherLanes();
    }
    absl::Status ended = EndOfStream(stream.Finish());
    if (!ended.ok()) return Fail(std::move(ended));
    if (lane == 0 && !reception_.has_result()) {
      Fail(absl::DataLossError("the stream ended without a result"));
    }
  }

  void ReadOtherLanes() {
    const Accepted& accepted = *reception_.accepted();
    for (uint32_t lane = 1; lane < accepted.num_lanes(); ++lane) {
      AttachLaneRequest attach;
      attach.set_request_id(accepted.request_id());
      attach.set_receiver(accepted.receiver());
      attach.set_lane(lane);
      attach.set_lane_key(accepted.lane_key());
      lane_threads_.emplace_back([this, lane, attach = std::move(attach)] {
        streams_[lane]->Start(kAttachLaneMethod, attach, deadline_);
        ReadStream(lane);
      });
    }
  }

  const char* const method_;
  const google::protobuf::MessageLite& request_;
  const absl::Time deadline_;
  const Metadata& metadata_;
  Reception reception_;
  std::vector<std::unique_ptr<RawStream>> streams_;  // by lane
  std::vector<std::thread> lane_threads_;

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

absl::StatusOr<std::shared_ptr<StartedPrefill>> PrefillClient::Start(
    const PrefillRequest& request, KvSink& sink, const PrefillCallOptions& options,
    PrefillDone done) {
  if (request.num_lanes() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_lanes ", request.num_lanes(), "; at most 1 without a thread that waits"));
  }
  if (options.cancellation != nullptr) {
    return absl::InvalidArgumentError("cancellation is for calls that block");
  }
  PREFILLD_RETURN_IF_ERROR(CheckMetadata(options.metadata));
  ServerChannels* const server = InTurn().front();
  return StartAsyncCall(
      server->OfLanes(1).front(), request, sink, options,
      [server, done = std::move(done)](absl::StatusOr<PrefillResult> result) mutable {
        if (absl::IsUnavailable(result.status())) server->Renew();
        std::move(done)(std::move(result));
      });
}

absl::StatusOr<PrefillResult> PrefillClient::Prefill(const PrefillRequest& request, KvSink& sink,
                                                     const PrefillCallOptions& options) {
  return Call(kPrefillMethod, request, sink, options);
}

absl::StatusOr<PrefillResult> PrefillClient::AttachReceiver(const AttachReceiverRequest& request,
                                                            KvSink& sink,
                                                            const PrefillCallOptions& options) {
  if (servers_.size() > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        "this client has ", servers_.size(), " servers; a receiver attaches to one that it knows"));
  }
  return Call(kAttachReceiverMethod, request, sink, options);
}

template <typename Request>
absl::StatusOr<PrefillResult> PrefillClient::Call(const char* method, const Request& request,
                                                  KvSink& sink, const PrefillCallOptions& options) {
  if (request.num_lanes() > kMaxLanes) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_lanes ", request.num_lanes(), ", allowed: 1 to ", kMaxLanes));
  }
  PREFILLD_RETURN_IF_ERROR(CheckMetadata(options.metadata));
  absl::StatusOr<PrefillResult> result;
  for (ServerChannels* server : InTurn()) {
    const auto channels = server->OfLanes(std::max(request.num_lanes(), 1u));
    PrefillCall call(method, request, sink, options, channels);
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
