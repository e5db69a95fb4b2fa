#include "client/prefill_client.h"

#include <algorithm>
#include <random>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/async_call.h"
#include "client/lane_choice.h"
#include "client/prefill_call.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "prefill/v1/prefill.grpc.pb.h"
#include "proto/status_macros.h"
#include "proto/wire/grpc_status.h"
#include "proto/wire/host_port.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::AttachReceiverRequest;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;
using ::prefill::v1::PrefillService;
using ::prefill::v1::ServerInfo;

constexpr char kTokenKey[] = "authorization";
constexpr char kAttachReceiverMethod[] = "/prefill.v1.PrefillService/AttachReceiver";

// Returns 32 hexadecimal digits that nobody can guess, from the operating system's random source.
std::string NewSecret() {
  std::random_device random;
  std::string secret;
  for (int i = 0; i < 4; ++i) absl::StrAppend(&secret, absl::Hex(random(), absl::kZeroPad8));
  return secret;
}

uint64_t NumTokens(const PrefillRequest& request) { return request.token_ids_size(); }
uint64_t NumTokens(const AttachReceiverRequest& request) { return request.num_tokens(); }

bool ComesHere(const PrefillRequest& request) {
  return !request.has_deliver_to() && request.pushes().empty();
}
bool ComesHere(const AttachReceiverRequest&) { return true; }

template <typename Request>
uint32_t LanesFor(const Request& request, const PrefillCallOptions& options,
                  ServerChannels& server) {
  if (!ComesHere(request)) return 0;  // the server chooses
  const uint64_t bytes_per_token =
      options.kv_bytes_per_token > 0 ? options.kv_bytes_per_token : server.kv_bytes_per_token();
  const uint32_t lanes =
      ChooseLanes(bytes_per_token * TokensToCome(request.layout(), NumTokens(request)));
  return lanes > 1 && server.HasOneLane() ? 1 : lanes;
}

absl::Status CheckTokenIsSafe(const ChannelOptions& options,
                              const std::vector<std::string>& addresses) {
  if (options.tls.has_value() || options.token_without_tls) return absl::OkStatus();
  for (const std::string& address : addresses) {
    if (wire::UnixSocketPath(address).has_value()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("token_file with ", address,
                     " in plain text; a token goes over TLS or a Unix socket, "
                     "unless token_without_tls is set"));
  }
  return absl::OkStatus();
}

}  // namespace

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

absl::StatusOr<std::unique_ptr<PrefillClient>> PrefillClient::Create(
    const ChannelOptions& options) {
  return Create(options, {options.address});
}

absl::StatusOr<std::unique_ptr<PrefillClient>> PrefillClient::Create(
    const ChannelOptions& options, const std::vector<std::string>& addresses) {
  if (addresses.empty()) return absl::InvalidArgumentError("no address of a server");
  PREFILLD_ASSIGN_OR_RETURN(const auto credentials, wire::MakeChannelCredentials(options.tls));
  std::unique_ptr<PrefillClient> client(new PrefillClient);
  if (!options.token_file.empty()) {
    PREFILLD_RETURN_IF_ERROR(CheckTokenIsSafe(options, addresses));
    PREFILLD_ASSIGN_OR_RETURN(client->token_, BearerToken::Read(options.token_file));
  }
  for (const std::string& address : addresses) {
    ChannelOptions server = options;
    server.address = address;
    client->servers_.push_back(std::make_unique<ServerChannels>(server, credentials));
  }
  return client;
}

PrefillClient::~PrefillClient() { small_calls_->AwaitIdle(); }

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
  if (options.cancellation != nullptr || options.resumable || !request.resume_key().empty()) {
    return absl::InvalidArgumentError("cancellation and resumable are for calls that block");
  }
  PREFILLD_ASSIGN_OR_RETURN(const PrefillCallOptions with_token, WithToken(options));
  ServerChannels* const server = InTurn().front();
  return StartAsyncCall(
      server->OfLanes(1).front(), request, sink, with_token,
      [server, done = std::move(done)](absl::StatusOr<PrefillResult> result) mutable {
        if (absl::IsUnavailable(result.status())) server->Renew();
        std::move(done)(std::move(result));
      });
}

// A call that brings a token of its own keeps that alone: a server takes none of two.
absl::StatusOr<PrefillCallOptions> PrefillClient::WithToken(const PrefillCallOptions& options) {
  PREFILLD_RETURN_IF_ERROR(CheckMetadata(options.metadata));
  PrefillCallOptions with_token = options;
  const bool has_own = std::any_of(options.metadata.begin(), options.metadata.end(),
                                   [](const auto& entry) { return entry.first == kTokenKey; });
  if (token_ != nullptr && !has_own) {
    with_token.metadata.emplace_back(kTokenKey, token_->Authorization());
  }
  return with_token;
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
  PREFILLD_ASSIGN_OR_RETURN(const PrefillCallOptions with_token, WithToken(options));
  Request asked = request;
  if (options.resumable && request.request_id().empty()) asked.set_request_id(NewSecret());
  bool was_accepted = false;
  // The server may still be about to hear that an attempt before this one is cancelled. What it
  // hears must not name this one, so that each has a key of its own.
  const auto ask = [&](ServerChannels& server, uint32_t num_lanes) {
    asked.set_num_lanes(num_lanes);
    if (options.resumable && request.resume_key().empty()) asked.set_resume_key(NewSecret());
    return CallServer(method, asked, sink, with_token, server, was_accepted);
  };
  absl::StatusOr<PrefillResult> result;
  for (ServerChannels* server : InTurn()) {
    const bool is_our_choice = request.num_lanes() == 0;
    const uint32_t num_lanes =
        is_our_choice ? LanesFor(request, options, *server) : request.num_lanes();
    result = ask(*server, num_lanes);
    if (is_our_choice && num_lanes > 1) {
      // The lanes of a request that runs found nobody who knows it: they ended at another server.
      if (was_accepted && absl::IsNotFound(result.status())) server->NoteOneLane();
      // A server or a tenant that may have fewer lanes was asked for more than the caller named.
      const bool may_be_the_lanes = !was_accepted && (absl::IsPermissionDenied(result.status()) ||
                                                      absl::IsInvalidArgument(result.status()));
      if (may_be_the_lanes) {
        result = ask(*server, 1);
        if (was_accepted) server->NoteOneLane();
      }
    }
    if (!absl::IsUnavailable(result.status())) break;
    server->Renew();
    if (was_accepted) break;
  }
  return result;
}

template <typename Request>
absl::StatusOr<PrefillResult> PrefillClient::CallServer(const char* method, const Request& request,
                                                        KvSink& sink,
                                                        const PrefillCallOptions& options,
                                                        ServerChannels& server,
                                                        bool& was_accepted) {
  const uint32_t lanes_here = ComesHere(request) ? request.num_lanes() : 1;
  PrefillCall call(method, request, sink, options, server.OfLanes(lanes_here), server.memories(),
                   small_calls_);
  absl::StatusOr<PrefillResult> result;
  {
    CancelHook hook(options.cancellation,
                    [&call] { call.Fail(absl::CancelledError("cancelled by the caller")); });
    result = call.Run();
  }
  was_accepted = call.accepted() != nullptr;
  if (was_accepted) server.NoteKvBytesPerToken(KvBytesPerToken(call.accepted()->layout()));
  return result;
}

}  // namespace prefilld::client
