// The push of one request's KV to one receiver, over as many calls as that takes.
#ifndef PREFILLD_SERVER_PUSH_TRANSFER_H_
#define PREFILLD_SERVER_PUSH_TRANSFER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include <grpcpp/alarm.h>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "prefill/v1/receiver.pb.h"
#include "proto/wire/lane_patience.h"
#include "proto/wire/trace_context.h"
#include "server/prefill_job.h"
#include "server/push_dialer.h"
#include "server/push_stream.h"

namespace prefilld::server {

// Each lane has one call at a time, on a connection of its own. Lane 0 is called first. Once the
// receiver has answered there, the other lanes are called. A receiver that does not know
// ReceiveLane gets everything by one call of Receive.
//
// A call that breaks is followed by another, after a pause, until the window of the request has
// passed without anything new having arrived. The first receipt of the new call says where to go
// on. Whatever else ends a call ends the push, and the job with it.
//
// The calls own it together, and so do the pauses between them.
class PushTransfer : public std::enable_shared_from_this<PushTransfer> {
 public:
  PushTransfer(std::shared_ptr<PrefillJob> job, PushDialer& dialer, std::function<void()> on_done);

  void Start();

 private:
  // Belongs to its call, or to the pause before the next.
  struct Lane {
    bool was_heard = false;  // a receipt of it has come
    uint64_t received = 0;   // the greatest of a receipt
    wire::LanePatience patience;
    std::unique_ptr<grpc::Alarm> pause;
  };

  void Enter(int64_t lanes);
  void Leave();
  void Call(uint32_t lane, PushStream::Method method = PushStream::Method::kReceiveLane);
  absl::Status OnReceipt(uint32_t lane, const ::prefill::v1::ReceiveReceipt& receipt, bool first);
  void OnFirstReceipt(uint32_t lane, int64_t frames_again);
  void OnCallDone(uint32_t lane, absl::Status status);
  void OnPlainCallDone(const absl::Status& status,
                       const std::optional<::prefill::v1::ReceiveResponse>& answer);
  void FallBack();
  bool CallAgain(uint32_t lane, const absl::Status& broken, absl::Status& reason);
  void Succeed();
  void Fail(const absl::Status& status);
  bool Conclude(const absl::Status& status);

  const std::shared_ptr<PrefillJob> job_;
  PushDialer& dialer_;
  const std::shared_ptr<PushDialer::Open> open_;
  const std::function<void()> on_done_;
  const wire::TraceContext span_;
  const absl::Time started_at_ = absl::Now();
  const bool may_resume_;

  std::vector<Lane> lanes_;
  std::atomic<int64_t> open_lanes_ = 0;
  std::atomic<bool> is_accepted_ = false;  // lane 0 has been heard
  std::atomic<bool> is_concluded_ = false;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PUSH_TRANSFER_H_
