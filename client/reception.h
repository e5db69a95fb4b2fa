#ifndef PREFILLD_CLIENT_RECEPTION_H_
#define PREFILLD_CLIENT_RECEPTION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/acknowledger.h"
#include "client/prefill_client.h"
#include "client/shared_memory.h"
#include "client/shared_memory_pool.h"
#include "client/transfer_check.h"
#include "grpcpp/support/byte_buffer.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/frame_codec.h"

namespace prefilld::client {

// Takes all that arrives of one Prefill or AttachReceiver call, on all of its lanes: checks the
// order of events and each frame, and passes them on to the sink. Of a resumable request, the
// stream of a lane may be followed by others, which bring some of it again.
class Reception {
 public:
  // The sink is borrowed. `max_lanes` is the number of streams that could be read.
  Reception(const ::prefill::v1::PrefillRequest& request, KvSink& sink, uint32_t max_lanes);
  Reception(const ::prefill::v1::AttachReceiverRequest& request, KvSink& sink, uint32_t max_lanes);

  // Has the frames of a resumable request acknowledged. Must be called before the first Take.
  void AcknowledgeTo(std::shared_ptr<Acknowledger> acknowledger) {
    acknowledger_ = std::move(acknowledger);
  }

  // Attaches shared memory of the pool, if the server takes it, and tells the sink. Must be called
  // once, after lane 0 has brought Accepted; other lanes may be read meanwhile.
  void AttachSharedMemory(SharedMemoryPool& pool);
  // Tells the server that frames of a lane that was resumed may lie there, as those before.
  void UseSharedMemoryAgain();
  // Returns the memory when everything has come; null: none was attached. Nothing must follow.
  std::unique_ptr<SharedMemory> TakeSharedMemory() { return std::move(attached_); }

  // Takes the next message of a lane. An error ends the call: DATA_LOSS or FAILED_PRECONDITION as
  // PrefillClient::Prefill says, or the sink's own. Messages of one lane come one after the other;
  // those of other lanes than 0 come once accepted() is there, and may come beside all others. With
  // a resumable request, another stream may bring right what was DATA_LOSS on this one.
  absl::Status Take(uint32_t lane, grpc::ByteBuffer& message);

  // Returns Accepted once lane 0 has brought it, which is before any other lane is read.
  const std::optional<::prefill::v1::Accepted>& accepted() const { return accepted_; }

  bool has_result() const { return has_result_.load(std::memory_order_acquire); }

  // These are for resumable requests: whether an error was the sink's own, or is for good, the
  // number of the first frame of a lane that is not here, and a number that grows with everything
  // new that arrives.
  bool refused_by_sink() const { return refused_by_sink_.load(std::memory_order_acquire); }
  bool is_beyond_repair() const { return check_ != nullptr && check_->is_beyond_repair(); }
  uint64_t received(uint32_t lane) const { return check_ == nullptr ? 0 : check_->received(lane); }
  uint64_t progress() const { return progress_.load(std::memory_order_relaxed); }

  // Returns the result, when every lane has ended with OK. DATA_LOSS says what is missing.
  absl::StatusOr<::prefill::v1::PrefillResult> Finish();

 private:
  absl::Status TakeFrame(uint32_t lane, wire::ReceivedFrame frame);
  void Acknowledge(uint32_t lane);
  absl::Status TakeEvent(::prefill::v1::PrefillEvent event);
  absl::Status TakeAccepted(const ::prefill::v1::Accepted& accepted);
  absl::Status BySink(absl::Status status);
  absl::Status CheckLogprobs() const;

  KvSink& sink_;
  const ExpectedTransfer expected_;
  const uint32_t max_lanes_;
  const bool delivered_elsewhere_ = false;
  const bool wants_logprobs_ = false;
  std::shared_ptr<Acknowledger> acknowledger_;  // null: the request is not resumable
  std::atomic<bool> refused_by_sink_ = false;
  std::atomic<uint64_t> progress_ = 0;
  std::atomic<bool> has_result_ = false;

  // Set by Accepted, before other lanes are read.
  std::optional<::prefill::v1::Accepted> accepted_;
  std::unique_ptr<TransferCheck> check_;
  std::optional<::prefill::v1::PrefillResult> result_;  // lane 0's
  std::unique_ptr<SharedMemory> attached_;              // null: none was attached
  // It is set before the server hears that frames may lie there. Null: all payloads come over gRPC.
  std::atomic<SharedMemory*> shared_memory_ = nullptr;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_RECEPTION_H_
