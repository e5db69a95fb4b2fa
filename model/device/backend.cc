#include "model/device/backend.h"

#include <spdlog/spdlog.h>

#include <chrono>
#include <utility>

#include "model/device/cpu_backend.h"
#ifdef PREFILLD_HAVE_CUDA
#include "model/device/cuda_backend.h"
#endif

namespace prefilld::model {
namespace {

#ifndef PREFILLD_HAVE_CUDA
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend() {
  return absl::FailedPreconditionError("this build has no CUDA backend");
}
#endif

}  // namespace

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) backend_->Free(kind_, data_, bytes_);
    backend_ = other.backend_;
    kind_ = other.kind_;
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) backend_->Free(kind_, data_, bytes_);
}

absl::Status Backend::TuneLinear(const kernels::LinearParams&) { return absl::OkStatus(); }

absl::Status Backend::Repeat(const RecordingKey&, absl::FunctionRef<absl::Status()> ops) {
  return ops();
}

absl::Status Backend::TuneGatedLinear(const kernels::GatedLinearParams&) {
  return absl::OkStatus();
}

// A device whose attention works in the caller's memory alone.
absl::Status Backend::ReserveAttention(const kernels::AttentionParams&, bool) {
  return absl::OkStatus();
}

absl::StatusOr<double> Backend::TimeMs(absl::FunctionRef<absl::Status()> ops) {
  if (absl::Status status = Synchronize(); !status.ok()) return status;
  const auto start = std::chrono::steady_clock::now();
  absl::Status status = ops();
  if (status.ok()) status = Synchronize();
  if (!status.ok()) return status;
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(DeviceChoice choice, int cpu_threads) {
  if (choice == DeviceChoice::kCpu) return CreateCpuBackend(cpu_threads);
  absl::StatusOr<std::unique_ptr<Backend>> cuda = CreateCudaBackend();
  if (choice == DeviceChoice::kCuda) return cuda;
  if (cuda.ok()) {
    spdlog::info("device auto: {} (first CUDA device)", (*cuda)->device_name());
    return cuda;
  }
  spdlog::info("device auto: cpu ({})", std::string(cuda.status().message()));
  return CreateCpuBackend(cpu_threads);
}

}  // namespace prefilld::model
