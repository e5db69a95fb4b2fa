#ifndef PREFILLD_CLIENT_TRANSFER_CHECK_H_
#define PREFILLD_CLIENT_TRANSFER_CHECK_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "prefill/v1/kv.pb.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/frame_codec.h"

namespace prefilld::client {

// The transfer that a consumer expects, known before its first frame.
struct ExpectedTransfer {
  ::prefill::v1::KvLayoutRequest layout;
  uint32_t num_tokens = 0;
  std::string model_fingerprint;  // empty: any
};

// Checks a layout. FAILED_PRECONDITION, with field, value and expectation, when `layout`
// contradicts itself or is not what was asked for.
absl::Status CheckLayout(const ::prefill::v1::KvLayout& layout, const ExpectedTransfer& expected);

// Compares one transfer's frames with what its layout promises: they are numbered without gaps per
// lane, inside the layout, of the right size, with the right checksum, each block of each layer
// once, none missing. Of a resumable transfer, frames may come again. Thread-safe: the checksums of
// several lanes are computed in parallel.
class TransferCheck {
 public:
  // `layout` must have passed CheckLayout.
  TransferCheck(const ::prefill::v1::KvLayout& layout, uint32_t num_lanes, bool resumable = false);

  enum class Arrival : uint8_t {
    kNew,
    kDamaged,  // its checksum is wrong, and it can be asked for once more
    kAgain,    // it has come before
  };
  // Takes a frame that arrived on `lane`. Its payload must be used only if it is kNew. DATA_LOSS
  // says what is wrong with it. If the transfer is not resumable, a frame is kNew or an error.
  absl::StatusOr<Arrival> Check(uint32_t lane, const wire::ReceivedFrame& frame);
  // Tells whether a frame arrived damaged so often that it is not asked for once more. Another
  // stream would bring it as damaged.
  bool is_beyond_repair() const;
  // Returns the number of the lane's first frame that has not arrived undamaged.
  uint64_t received(uint32_t lane) const;
  // Must be called after the last frame of every lane. DATA_LOSS when something is missing.
  absl::Status Finish(const ::prefill::v1::PrefillResult& result) const;

  uint64_t frames() const;
  uint64_t bytes() const;

 private:
  absl::Status CheckPlace(uint32_t lane, const wire::ReceivedFrame& frame) const;
  // Tells whether all blocks of a frame are here. A frame whose number was damaged on the way looks
  // like one that comes again, but for its blocks.
  bool HasArrived(const wire::ReceivedFrame& frame) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status MarkArrived(uint32_t lane, const wire::ReceivedFrame& frame)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const bool resumable_;
  const ::prefill::v1::KvLayout layout_;
  const uint64_t pair_bytes_;  // of one block, K and V

  mutable absl::Mutex mu_;
  std::vector<uint64_t> frames_per_lane_ ABSL_GUARDED_BY(mu_);  // damaged ones included
  // The frames of each lane that arrived damaged, and how often they did since they last were not.
  std::vector<std::map<uint64_t, int>> damaged_ ABSL_GUARDED_BY(mu_);
  std::vector<bool> arrived_ ABSL_GUARDED_BY(mu_);  // [num_layers, num_blocks]
  uint64_t blocks_missing_ ABSL_GUARDED_BY(mu_);    // over all layers
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  bool is_beyond_repair_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_TRANSFER_CHECK_H_
