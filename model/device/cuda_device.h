// The device over kernels/cuda: bf16 on one GPU.
#ifndef PREFILLD_MODEL_DEVICE_CUDA_DEVICE_H_
#define PREFILLD_MODEL_DEVICE_CUDA_DEVICE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "model/device/device.h"

namespace prefilld::model {

// Creates the device on the first visible GPU (CUDA_VISIBLE_DEVICES chooses). FAILED_PRECONDITION,
// with the driver's reason, when there is none or it is older than compute capability 8.0.
//
// Ops run on one stream, and PackKv on streams of its own. An error of the device itself (a fault
// in a kernel, a lost GPU) is UNAVAILABLE and cannot be recovered: every later call returns the
// same error.
absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice();

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_DEVICE_H_
