#include "model/device/device.h"

#include <spdlog/spdlog.h>

#include <utility>

#include "kernels/cpu/ops.h"

namespace prefilld::model {

#ifndef PREFILLD_HAVE_CUDA
absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice() {
  return absl::FailedPreconditionError("this build has no CUDA device");
}
#endif

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) device_->Free(kind_, data_, bytes_);
    device_ = other.device_;
    kind_ = other.kind_;
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) device_->Free(kind_, data_, bytes_);
}

absl::StatusOr<DeviceBuffer> Device::AdoptStaging(void*, size_t) { return DeviceBuffer(); }

void Device::PackHostKv(const kernels::PackKvParams& params, absl::Span<const int> pages,
                        int page_tokens) const {
  kernels::PackKvParams on_host = params;
  on_host.src_dtype = traits().compute_dtype;
  kernels::cpu::PackPagedKv(on_host, {.pages = pages.data(), .page_tokens = page_tokens});
}

absl::Status Device::Repeat(const RecordingKey&, absl::FunctionRef<absl::Status()> ops) {
  return ops();
}

absl::Status Ops::TuneLinear(const kernels::LinearParams&) { return absl::OkStatus(); }

absl::Status Ops::TuneGatedLinear(const kernels::GatedLinearParams&) { return absl::OkStatus(); }

// A device inherits these two if the op needs no memory beside the caller's.
absl::Status Ops::ReserveAttention(const kernels::AttentionParams&, bool) {
  return absl::OkStatus();
}

absl::Status Ops::ReserveAntidiagonalScores(const kernels::AntidiagonalScoresParams&) {
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Device>> CreateDevice(DeviceChoice choice, int cpu_threads) {
  if (choice == DeviceChoice::kCpu) return CreateCpuDevice(cpu_threads);
  absl::StatusOr<std::unique_ptr<Device>> cuda = CreateCudaDevice();
  if (choice == DeviceChoice::kCuda) return cuda;
  if (cuda.ok()) {
    spdlog::info("device auto: {} (first CUDA device)", (*cuda)->traits().name);
    return cuda;
  }
  spdlog::info("device auto: cpu ({})", std::string(cuda.status().message()));
  return CreateCpuDevice(cpu_threads);
}

}  // namespace prefilld::model
