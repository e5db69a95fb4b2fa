// The client of prefilld: it has a prompt prefilled, and receives and verifies its KV cache.
#ifndef PREFILLD_CLIENT_PREFILL_CLIENT_H_
#define PREFILLD_CLIENT_PREFILL_CLIENT_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/acknowledger.h"
#include "client/bearer_token.h"
#include "client/cancellation.h"
#include "client/server_channels.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/channel.h"
#include "proto/wire/frame_codec.h"

namespace prefilld::client {

using ChannelOptions = wire::ChannelOptions;
using TlsOptions = wire::ChannelTls;

// Takes what a Prefill call brings. An error that a method returns cancels the call and becomes its
// status. OnAccepted comes first. After that OnFrame may run in several threads at once, one per
// lane, beside OnProgress.
class KvSink {
 public:
  virtual ~KvSink() = default;
  // Called when the server accepts. The layout has been compared with the request.
  virtual absl::Status OnAccepted(const ::prefill::v1::Accepted& accepted) = 0;
  virtual absl::Status OnProgress(const ::prefill::v1::Progress& progress) = 0;
  // Called with each frame that passed every check, its checksum included. A slow call slows the
  // sender down. The payload must not be used after the call, for it may lie in memory that the
  // server uses again. wire::StridesOf says where in it an element lies, and in DTYPE_FP8_E4M3
  // wire::ScalesOffset and ScaleStridesOf where its scale does; wire::E4m3Value reads an element.
  virtual absl::Status OnFrame(const wire::ReceivedFrame& frame) = 0;
  // Called after OnAccepted by calls that block: OK if the server's shared memory is attached, so
  // that frames may lie there, else the reason why all payloads come over gRPC.
  virtual void OnSharedMemory(const absl::Status& attached) {}
};

// Keys and values that go with a call, as gRPC headers.
using Metadata = std::vector<std::pair<std::string, std::string>>;

// INVALID_ARGUMENT: a key or a value is not what gRPC carries as text. It would end the process
// over that.
absl::Status CheckMetadata(const Metadata& metadata);

struct PrefillCallOptions {
  absl::Time deadline = absl::InfiniteFuture();
  Cancellation* cancellation = nullptr;  // borrowed for the duration of the call; may be null
  // Goes with the call. Servers that tell tenants apart by metadata look for it there:
  // {"x-tenant", "search"}. A token is better shown by ChannelOptions::token_file.
  Metadata metadata = {};
  // Whether a broken connection may cost no more than a moment: the request is resumable
  // (proto/prefill/v1/resumption.proto), if the server grants that, and streams that break are
  // attached again, and damaged frames asked for again. The server then hears of a cancel by a call
  // of its own. The request's request_id and resume_key are chosen if they are empty.
  bool resumable = false;
  // Chooses the lanes of a request whose num_lanes is 0 (lane_choice.h), for callers that know the
  // model. 0: the client goes by what the server accepted last, and uses one lane before that.
  uint64_t kv_bytes_per_token = 0;
  // Whether KV is read from the server's shared memory if it can be reached from here, as it can on
  // one host. Calls that block do that, and others get all KV over gRPC.
  bool shared_memory = true;
};

// A prompt that PrefillClient::Start has sent. It may be dropped at any time, and the call goes on.
class StartedPrefill {
 public:
  virtual ~StartedPrefill() = default;
  // Ends the call with CANCELLED unless it has ended. Thread-safe, and waits for nothing.
  virtual void Cancel() = 0;
};

// Gets what PrefillClient::Prefill would return.
using PrefillDone =
    absl::AnyInvocable<void(absl::StatusOr<::prefill::v1::PrefillResult> result) &&>;

// Makes any number of calls at once. Thread-safe.
class PrefillClient {
 public:
  // Creates a client that connects lazily: if the server is not there, the first call fails.
  // INVALID_ARGUMENT: as wire::OpenChannel; the token cannot be read, or would go in plain text.
  static absl::StatusOr<std::unique_ptr<PrefillClient>> Create(const ChannelOptions& options);

  // Creates a client of several servers of one model, each with an address of its own; what else
  // `options` says holds for all. They take the calls in turn, all lanes of a call go to the same
  // one, and one that is unavailable and has not accepted the call passes it on to the next.
  static absl::StatusOr<std::unique_ptr<PrefillClient>> Create(
      const ChannelOptions& options, const std::vector<std::string>& addresses);

  // Waits, for a second at most, until servers have heard the last of resumable requests.
  ~PrefillClient();

  absl::StatusOr<::prefill::v1::ServerInfo> GetServerInfo(absl::Duration timeout);

  // Runs one prompt and returns when the whole cache has gone to `sink`, or with the reason why
  // not: the server's status (see PrefillService), CANCELLED, the sink's error, and
  //   INVALID_ARGUMENT     metadata has a key or a value that gRPC does not carry
  //   FAILED_PRECONDITION  the server answered with another layout than asked for
  //   UNAVAILABLE          also: a connection broke, and could not be resumed
  //   DATA_LOSS            a frame is damaged, missing, or not what the layout promises, the
  //                        stream ended without a result, or its log-probabilities are not as
  //                        many as asked for
  // Each lane has a connection, and beyond the first a thread, of its own. If num_lanes is 0, the
  // client chooses their number by the size of the KV: lane_choice.h. It is 1 for an address that
  // stands for several machines, and where the server or the tenant may not have more. With
  // deliver_to or pushes the frames go elsewhere and the sink sees progress alone.
  absl::StatusOr<::prefill::v1::PrefillResult> Prefill(const ::prefill::v1::PrefillRequest& request,
                                                       KvSink& sink,
                                                       const PrefillCallOptions& options = {});

  // Receives a share of what another caller's Prefill with num_receivers > 1 computes, before or
  // after that call was made. All else is as in Prefill. FAILED_PRECONDITION: this client has
  // several servers, and cannot know which of them has the request.
  absl::StatusOr<::prefill::v1::PrefillResult> AttachReceiver(
      const ::prefill::v1::AttachReceiverRequest& request, KvSink& sink,
      const PrefillCallOptions& options = {});

  // Sends one prompt and returns at once. No thread waits for it, so thousands may be under way.
  // `done` is called once, when all is over. It and the sink run on threads of gRPC's, which they
  // must not block. The sink and this client must live until `done` has been called. One server is
  // asked, the next in turn, and the cache comes on one lane. INVALID_ARGUMENT: num_lanes is more
  // than 1, a cancellation is given, the request is resumable, or as Prefill.
  absl::StatusOr<std::shared_ptr<StartedPrefill>> Start(
      const ::prefill::v1::PrefillRequest& request, KvSink& sink, const PrefillCallOptions& options,
      PrefillDone done);

 private:
  PrefillClient() = default;
  // Makes a call that blocks. `Request` is that of Prefill or of AttachReceiver.
  template <typename Request>
  absl::StatusOr<::prefill::v1::PrefillResult> Call(const char* method, const Request& request,
                                                    KvSink& sink,
                                                    const PrefillCallOptions& options);
  // Makes it at one server. `was_accepted` becomes whether the server took it.
  template <typename Request>
  absl::StatusOr<::prefill::v1::PrefillResult> CallServer(const char* method,
                                                          const Request& request, KvSink& sink,
                                                          const PrefillCallOptions& options,
                                                          ServerChannels& server,
                                                          bool& was_accepted);
  // Returns the options of a call with the client's token among its metadata. INVALID_ARGUMENT: the
  // metadata cannot be sent.
  absl::StatusOr<PrefillCallOptions> WithToken(const PrefillCallOptions& options);

  // Returns the order in which a call tries the servers: in turn, and last those that are known to
  // be away.
  std::vector<ServerChannels*> InTurn();

  // The channel of lane 0 also serves all other calls.
  std::vector<std::unique_ptr<ServerChannels>> servers_;
  std::atomic<uint64_t> turn_ = 0;
  const std::shared_ptr<SmallCalls> small_calls_ = std::make_shared<SmallCalls>();
  std::unique_ptr<BearerToken> token_;  // null: none is shown
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_PREFILL_CLIENT_H_
