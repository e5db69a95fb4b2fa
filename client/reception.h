#ifndef PREFILLD_CLIENT_RECEPTION_H_
#define PREFILLD_CLIENT_RECEPTION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/prefill_client.h"
#include "client/transfer_check.h"
#include "grpcpp/support/byte_buffer.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/frame_codec.h"

namespace prefilld::client {

// Takes all that arrives of one Prefill or AttachReceiver call, on all of its lanes: checks the
// order of events and each frame, and passes them on to the sink.
class Reception {
 public:
  // The sink is borrowed. `max_lanes` is the number of streams that could be read.
  Reception(const ::prefill::v1::PrefillRequest& request, KvSink& sink, uint32_t max_lanes);
  Reception(const ::prefill::v1::AttachReceiverRequest& request, KvSink& sink, uint32_t max_lanes);

  // Takes the next message of a lane. An error ends the call: DATA_LOSS or FAILED_PRECONDITION as
  // PrefillClient::Prefill says, or the sink's own. Messages of one lane come one after the other;
  // those of other lanes than 0 come once accepted() is there, and may come beside all others.
  absl::Status Take(uint32_t lane, grpc::ByteBuffer& message);

  // Returns Accepted once lane 0 has brought it, which is before any other lane is read.
  const std::optional<::prefill::v1::Accepted>& accepted() const { return accepted_; }

  bool has_result() const { return result_.has_value(); }

  // Returns the result, when every lane has ended with OK. DATA_LOSS says what is missing.
  absl::StatusOr<::prefill::v1::PrefillResult> Finish();

 private:
  absl::Status TakeFrame(uint32_t lane, const wire::ReceivedFrame& frame);
  absl::Status TakeEvent(::prefill::v1::PrefillEvent event);
  absl::Status TakeAccepted(const ::prefill::v1::Accepted& accepted);
  absl::Status CheckLogprobs() const;

  KvSink& sink_;
  const ExpectedTransfer expected_;
  const uint32_t max_lanes_;
  const bool delivered_elsewhere_ = false;
  const bool wants_logprobs_ = false;

  // Set by Accepted, before other lanes are read.
  std::optional<::prefill::v1::Accepted> accepted_;
  std::unique_ptr<TransferCheck> check_;
  std::optional<::prefill::v1::PrefillResult> result_;  // lane 0's
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_RECEPTION_H_
