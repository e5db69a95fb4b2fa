// Linear layers on CUDA by cuBLASLt; the op's contract is kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_CUDA_LINEAR_H_
#define PREFILLD_KERNELS_CUDA_LINEAR_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda {

// What cuBLASLt chooses an algorithm by.
struct LinearShape {
  int64_t num_tokens = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  uint32_t alignment = 0;  // bytes that all operands are aligned to, at most 256
  bool bias = false;
  bool accumulate = false;

  auto operator<=>(const LinearShape&) const = default;
};
LinearShape ShapeOf(const LinearParams& params);

// Holds the library's handle, its workspace and the algorithm chosen for each shape seen so far:
// the library's own first choice, or the fastest by trying for shapes that were tuned. For use by
// one thread and on one stream, since all products share the workspace.
class LinearLauncher {
 public:
  LinearLauncher();
  LinearLauncher(const LinearLauncher&) = delete;
  LinearLauncher& operator=(const LinearLauncher&) = delete;
  ~LinearLauncher();

  // `workspace` is device memory, aligned to 256 bytes, borrowed. Call once, before Launch.
  cublasStatus_t Initialize(void* workspace, size_t workspace_bytes);
  // CUBLAS_STATUS_NOT_SUPPORTED: no algorithm for the shape.
  cublasStatus_t Launch(const LinearParams& params, cudaStream_t stream);

  // Times what the library proposes for the shape, in turns, and keeps the fastest for Launch.
  // Takes about a second for a product of two TFLOP and waits for the stream; y is overwritten. The
  // operands should hold numbers like those to come: with zeros, or for a moment, a GPU runs at
  // clocks that it cannot keep up, and other algorithms win. On failure Launch is as it was.
  cublasStatus_t Tune(const LinearParams& params, cudaStream_t stream);

  // Whether Launch takes the choice of a Tune for this shape, its own or one taken over.
  bool IsTuned(const LinearShape& shape) const;

  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // cuBLAS's own choice on Hopper

 private:
  struct Plan;
  // The library's proposals, at most `max_proposals`, its favourite first and chosen.
  cublasStatus_t MakePlan(const LinearShape& shape, int max_proposals,
                          std::unique_ptr<Plan>* plan) const;
  cublasStatus_t Run(const Plan& plan, const LinearParams& params, cudaStream_t stream) const;
  // The plan whose tuning holds for the shape; null: none.
  const Plan* TuningFor(const LinearShape& shape) const;
  Plan& Keep(const LinearShape& shape, std::unique_ptr<Plan> plan);

  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  std::map<LinearShape, std::unique_ptr<Plan>> plans_;
};

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_LINEAR_H_
