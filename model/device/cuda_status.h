// Turns the errors of CUDA and cuBLASLt into statuses.
#ifndef PREFILLD_MODEL_DEVICE_CUDA_STATUS_H_
#define PREFILLD_MODEL_DEVICE_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include <atomic>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "kernels/cuda/launch_status.h"

namespace prefilld::model {

// Tells whether the error is a fault, after which the device's context is lost and every later call
// fails.
bool IsDeviceFault(cudaError_t error);

// Makes a status: UNAVAILABLE for a fault, RESOURCE_EXHAUSTED for lack of memory, otherwise
// INTERNAL. The message names `what` and the error of the library that failed. cudaError_t converts
// to LaunchStatus.
absl::Status CudaStatus(const kernels::cuda::LaunchStatus& launch, absl::string_view what);

// Returns INVALID_ARGUMENT that says for which shape no kernel is built. A dimension of 0 is left
// out.
absl::Status UnsupportedShape(absl::string_view op, int head_dim, int block_tokens);

// Remembers the first fault of a device, after which every call answers with it. Thread-safe.
class CudaFault {
 public:
  // Turns an error into a status and keeps it if it is a fault of the device.
  absl::Status Check(const kernels::cuda::LaunchStatus& launch, absl::string_view what);
  // Returns OK as long as the device works.
  absl::Status status() const;

 private:
  std::atomic<bool> faulted_{false};
  mutable absl::Mutex mu_;
  absl::Status fault_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_STATUS_H_
