// One call to a decode worker's KvReceiver, as a transport.
#ifndef PREFILLD_SERVER_PUSH_STREAM_H_
#define PREFILLD_SERVER_PUSH_STREAM_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/client_callback.h>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "prefill/v1/receiver.pb.h"
#include "proto/wire/socket_use.h"
#include "server/lane_queue.h"
#include "server/transport.h"

namespace prefilld::server {

// Sends every message as a ReceiveRequest. It owns itself and is deleted when gRPC is done with the
// call.
//
// ReceiveLane answers with receipts. The opening message counts as taken once its first receipt is
// here, and the result once the receipt that says `complete` is. Receive is client-streaming; on
// the wire that is a bidirectional stream with one response, which lets requests be encoded by
// hand. There the result counts as taken once the response is here. Until then the stall of such a
// message is timed, and an abort finds the stream.
class PushStream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                         public Transport {
 public:
  enum class Method : uint8_t { kReceiveLane, kReceive };

  struct Call {
    Method method = Method::kReceiveLane;
    ::prefill::v1::ReceiveOpen open;
    std::shared_ptr<grpc::Channel> channel;
    absl::Time deadline = absl::InfiniteFuture();  // of the system's clock
    std::vector<std::pair<std::string, std::string>> metadata;
    std::function<int64_t()> open_streams;  // how many may share the connection
  };

  struct Events {
    // Takes a receipt; `first` is set for the first of the stream. An error ends the call with it.
    absl::AnyInvocable<absl::Status(const ::prefill::v1::ReceiveReceipt&, bool first)> on_receipt;
    // The call is over and its share of the channel is gone. `answer` is the response of Receive.
    absl::AnyInvocable<void(const absl::Status&,
                            std::optional<::prefill::v1::ReceiveResponse> answer)>
        on_done;
  };

  // Opens the call and attaches it to the queue, which is borrowed.
  static void Start(LaneQueue* queue, Call call, Events events);

  void Send(Message message, bool last) override;
  void End(const absl::Status& status) override;
  void Cancel(const absl::Status& status) override { context_.TryCancel(); }
  std::optional<ConnectionUse> connection_use() const override;

 private:
  // The parts that are here of the messages that have to be written and answered.
  enum Part : int { kOpenWritten = 1, kOpenAnswered = 2, kLastWritten = 4, kLastAnswered = 8 };
  enum class UnderWay : uint8_t { kOpen, kFrame, kLast };

  PushStream(LaneQueue* queue, Call call, Events events);

  void OnWriteDone(bool ok) override;
  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;
  absl::Status TakeReceipt();
  void TakePart(int part);
  void NoteBroken();

  LaneQueue* const queue_;
  Call call_;
  Events events_;
  grpc::ClientContext context_;
  grpc::GenericStub stub_;
  grpc::ByteBuffer response_;
  // The queue asks for the use under its lock.
  mutable wire::SocketsToPeer sockets_;

  UnderWay kind_under_way_ = UnderWay::kFrame;  // written by Send, read when its write is done
  grpc::ByteBuffer under_way_;                  // belongs to gRPC from Send to OnWriteDone
  std::atomic<int> parts_;
  std::atomic<bool> result_is_sent_ = false;
  std::atomic<bool> is_broken_ = false;

  // Belong to the reactions to reads, and to OnDone, which comes after them.
  bool has_receipt_ = false;
  bool is_complete_ = false;
  absl::Status failure_;
  std::optional<::prefill::v1::ReceiveResponse> answer_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PUSH_STREAM_H_
