#include "model/device/cuda_status.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace prefilld::model {

bool IsDeviceFault(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorDevicesUnavailable:
    case cudaErrorSystemNotReady:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

absl::Status CudaStatus(const kernels::cuda::LaunchStatus& launch, absl::string_view what) {
  if (launch.ok()) return absl::OkStatus();
  if (launch.cublas() != CUBLAS_STATUS_SUCCESS) {
    return absl::InternalError(absl::StrCat(what, ": ", cublasLtGetStatusName(launch.cublas())));
  }
  const cudaError_t error = launch.cuda();
  const std::string message =
      absl::StrCat(what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  if (IsDeviceFault(error)) return absl::UnavailableError(message);
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(message);
  return absl::InternalError(message);
}

absl::Status UnsupportedShape(absl::string_view op, int head_dim, int block_tokens) {
  std::string message = absl::StrCat(op, " on CUDA: unsupported shape");
  if (head_dim != 0) absl::StrAppend(&message, "; head_dim ", head_dim, ", built for 64, 128");
  if (block_tokens != 0) {
    absl::StrAppend(&message, "; block_tokens ", block_tokens, ", built for 64, 128");
  }
  return absl::InvalidArgumentError(message);
}

absl::Status CudaFault::Check(const kernels::cuda::LaunchStatus& launch, absl::string_view what) {
  if (launch.ok()) return absl::OkStatus();
  cudaGetLastError();  // kept by the runtime: the next launch must not take it for its own
  absl::Status status = CudaStatus(launch, what);
  if (IsDeviceFault(launch.cuda())) {
    absl::MutexLock lock(&mu_);
    if (fault_.ok()) fault_ = status;
    faulted_.store(true);
  }
  return status;
}

absl::Status CudaFault::status() const {
  if (!faulted_.load(std::memory_order_relaxed)) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  return fault_;
}

}  // namespace prefilld::model
