// The result of launches that can fail in the CUDA runtime or in cuBLASLt.
#ifndef PREFILLD_KERNELS_CUDA_LAUNCH_STATUS_H_
#define PREFILLD_KERNELS_CUDA_LAUNCH_STATUS_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <ostream>

namespace prefilld::kernels::cuda {

// Success, or the one error that made a launch fail, as the library that found it names it. Both
// libraries' results convert to it, so launchers return them as they are. Launchers that use no
// cuBLASLt return cudaError_t.
class [[nodiscard]] LaunchStatus {
 public:
  constexpr LaunchStatus() = default;
  constexpr LaunchStatus(cudaError_t error) : cuda_(error) {}         // NOLINT: implicit
  constexpr LaunchStatus(cublasStatus_t status) : cublas_(status) {}  // NOLINT: implicit

  constexpr bool ok() const { return cuda_ == cudaSuccess && cublas_ == CUBLAS_STATUS_SUCCESS; }
  // cudaSuccess where cuBLASLt failed.
  constexpr cudaError_t cuda() const { return cuda_; }
  // CUBLAS_STATUS_SUCCESS where the CUDA runtime failed.
  constexpr cublasStatus_t cublas() const { return cublas_; }

  // Whether the GPU or the runtime failed, so that another way to compute the same would fail too.
  // False on success, and where this one way does not compute the shape.
  constexpr bool is_fault() const {
    return (cuda_ != cudaSuccess && cuda_ != cudaErrorInvalidValue) ||
           cublas_ == CUBLAS_STATUS_EXECUTION_FAILED;
  }

  bool operator==(const LaunchStatus&) const = default;

 private:
  cudaError_t cuda_ = cudaSuccess;
  cublasStatus_t cublas_ = CUBLAS_STATUS_SUCCESS;
};

// The error's name, for tests' messages.
inline std::ostream& operator<<(std::ostream& stream, const LaunchStatus& status) {
  return stream << (status.cublas() != CUBLAS_STATUS_SUCCESS
                        ? cublasLtGetStatusName(status.cublas())
                        : cudaGetErrorName(status.cuda()));
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_LAUNCH_STATUS_H_
