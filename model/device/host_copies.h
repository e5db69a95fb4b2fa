// Copies between device memory and host memory that run beside the ops.
#ifndef PREFILLD_MODEL_DEVICE_HOST_COPIES_H_
#define PREFILLD_MODEL_DEVICE_HOST_COPIES_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace prefilld::model {

// A copy of rows that have equal distances. Lengths are in bytes.
struct RowCopy {
  void* dst = nullptr;
  size_t dst_stride = 0;  // at most kMaxStride, as is src_stride
  const void* src = nullptr;
  size_t src_stride = 0;
  size_t row_bytes = 0;
  size_t rows = 0;

  static constexpr size_t kMaxStride = (size_t{1} << 31) - 1;
};

// The copies of one device. Host memory is that of Device::AllocateStaging. A load goes to the
// device, a save comes from it. Loads are ordered among themselves, and so are saves; a load and a
// save are not. The thread that calls the device's ops calls all methods but those marked
// thread-safe.
class HostCopies {
 public:
  virtual ~HostCopies() = default;

  // Starts copies to device memory. They run behind all earlier ops and beside those that follow.
  virtual absl::Status StartLoads(absl::Span<const RowCopy> copies) = 0;
  // Lets the ops that follow wait for the loads started so far. The host does not wait.
  virtual absl::Status OrderOpsBehindLoads() = 0;
  // Waits for all loads.
  virtual absl::Status FinishLoads() = 0;

  // Starts copies from device memory that earlier ops have completed (Device::Synchronize, or
  // ElapsedUs to a mark behind them, has returned since). They wait for no op.
  virtual absl::Status StartSaves(absl::Span<const RowCopy> copies) = 0;
  // Waits for all saves started so far. Thread-safe.
  virtual absl::Status FinishSaves() = 0;

  // Returns how long loads have taken in all; the latest may be missing. Thread-safe.
  virtual double load_seconds() const = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_HOST_COPIES_H_
