// The calls of KvReceiver, as far as they are alike.
#ifndef PREFILLD_CLIENT_DECODE_WORKER_PUSHED_STREAM_H_
#define PREFILLD_CLIENT_DECODE_WORKER_PUSHED_STREAM_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/cancellation.h"
#include "client/decode_worker/metrics.h"
#include "client/decode_worker/pending_transfers.h"
#include "grpcpp/alarm.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "prefill/v1/receiver.pb.h"
#include "proto/wire/arrivals.h"
#include "proto/wire/frame_codec.h"
#include "proto/wire/trace_context.h"

namespace prefilld::client {

// Everything here is borrowed. A stream whose ReceiveOpen does not come within
// `open_timeout` is ended. `arrivals` hears of calls.
struct PushSurroundings {
  PendingTransfers* transfers;
  absl::Duration open_timeout;
  WorkerMetrics* metrics;
  wire::Arrivals* arrivals;
};

// One pushed stream, which is a reactor of gRPC's besides. Its messages are read one after the
// other; it may be answered by any thread.
class PushedStream {
 protected:
  PushedStream(const PushSurroundings& surroundings, const grpc::CallbackServerContext& context,
               bool has_lanes);
  virtual ~PushedStream() = default;

  // Takes a message. An error ends the stream.
  absl::Status Take(grpc::ByteBuffer& message);
  // Ends the call, unless it has been answered.
  void Answer(const absl::Status& status);

  // Null until OnOpen.
  const std::shared_ptr<PendingTransfer>& transfer() const { return transfer_; }
  uint32_t lane() const { return lane_; }

 private:
  virtual absl::Status OnOpen(const ::prefill::v1::ReceiveOpen& open) = 0;
  virtual absl::Status OnFrame(const wire::ReceivedFrame& frame) = 0;
  virtual absl::Status OnResult(::prefill::v1::PrefillResult result) = 0;
  // Sends the status. It is called once, by whichever thread finds a reason first.
  virtual void Reply(const absl::Status& status) = 0;

  absl::Status TakeOpen(const ::prefill::v1::ReceiveOpen& open);
  void Log(const absl::Status& status) const;

  const wire::Arrivals::Stream stream_;
  PendingTransfers* const transfers_;
  const bool has_lanes_;
  const std::string peer_;
  const wire::TraceContext trace_;
  const absl::Time arrival_ = absl::Now();
  std::shared_ptr<PendingTransfer> transfer_;
  uint32_t lane_ = 0;
  std::atomic<bool> answered_ = false;
  std::optional<CancelHook> abandoned_hook_;

  // The alarm owns this too, because it may go off while this call is destroyed.
  const std::shared_ptr<Cancellation> late_ = std::make_shared<Cancellation>();
  const CancelHook late_hook_;
  grpc::Alarm open_alarm_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_PUSHED_STREAM_H_
