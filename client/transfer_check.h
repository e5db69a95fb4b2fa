#ifndef PREFILLD_CLIENT_TRANSFER_CHECK_H_
#define PREFILLD_CLIENT_TRANSFER_CHECK_H_

#include <cstdint>
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
// once, none missing. Thread-safe: the checksums of several lanes are computed in parallel.
class TransferCheck {
 public:
  // `layout` must have passed CheckLayout.
  TransferCheck(const ::prefill::v1::KvLayout& layout, uint32_t num_lanes);

  // Takes a frame that arrived on `lane`. DATA_LOSS says what is wrong with it; its payload must
  // then not be used.
  absl::Status Check(uint32_t lane, const wire::ReceivedFrame& frame);
  // Must be called after the last frame of every lane. DATA_LOSS when something is missing.
  absl::Status Finish(const ::prefill::v1::PrefillResult& result) const;

  uint64_t frames() const;
  uint64_t bytes() const;

 private:
  absl::Status CheckPlace(uint32_t lane, const wire::ReceivedFrame& frame) const;
  absl::Status MarkArrived(uint32_t lane, const wire::ReceivedFrame& frame);

  const ::prefill::v1::KvLayout layout_;
  const uint64_t pair_bytes_;  // of one block, K and V

  mutable absl::Mutex mu_;
  std::vector<uint64_t> frames_per_lane_ ABSL_GUARDED_BY(mu_);
  std::vector<bool> arrived_ ABSL_GUARDED_BY(mu_);  // [num_layers, num_blocks]
  uint64_t blocks_missing_ ABSL_GUARDED_BY(mu_);    // over all layers
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_TRANSFER_CHECK_H_
