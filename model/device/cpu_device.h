// The device over kernels/cpu: fp32 in ordinary memory. Every op is done when it returns.
#ifndef PREFILLD_MODEL_DEVICE_CPU_DEVICE_H_
#define PREFILLD_MODEL_DEVICE_CPU_DEVICE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "model/device/device.h"

namespace prefilld::model {

// Creates the device. num_threads 0 means all cores; INVALID_ARGUMENT when it is negative.
absl::StatusOr<std::unique_ptr<Device>> CreateCpuDevice(int num_threads);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CPU_DEVICE_H_
