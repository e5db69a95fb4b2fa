// Linear layers on CUDA by cuBLASLt; the op's contract is kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_CUDA_LINEAR_H_
#define PREFILLD_KERNELS_CUDA_LINEAR_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "kernels/cuda/launch_status.h"
#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda {

// The properties of a product by which cuBLASLt chooses an algorithm.
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

// Computes products by cuBLASLt. It holds the library's handle, its workspace and the algorithm
// chosen for each shape seen so far: the fastest by trying for shapes that were tuned, the
// library's own first choice for others. One thread uses it, on one stream, since all products
// share the workspace.
class LinearLauncher {
 public:
  LinearLauncher();
  LinearLauncher(const LinearLauncher&) = delete;
  LinearLauncher& operator=(const LinearLauncher&) = delete;
  ~LinearLauncher();

  // `workspace` is device memory, aligned to 256 bytes, borrowed. Call once, before Launch.
  LaunchStatus Initialize(void* workspace, size_t workspace_bytes);
  // CUBLAS_STATUS_NOT_SUPPORTED: the library has no algorithm for the shape.
  LaunchStatus Launch(const LinearParams& params, cudaStream_t stream);

  // Times the algorithms that the library proposes for the shape, and keeps the fastest for Launch.
  // It takes about a second for a product of two TFLOP, waits for the stream, and overwrites y. The
  // operands should hold numbers like those to come: with zeros, or for a moment, a GPU runs at
  // clocks that it cannot keep up, and other algorithms win. A failure leaves Launch as it was.
  LaunchStatus Tune(const LinearParams& params, cudaStream_t stream);

  // Whether Launch uses a tuned algorithm for this shape. It may have been tuned for the same
  // product with another number of tokens (TuningHolds).
  bool IsTuned(const LinearShape& shape) const;

  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // cuBLAS's own choice on Hopper

 private:
  struct Plan;
  // Makes a plan with at most `max_proposals` of the library's algorithms. Its favourite is the
  // first and the one chosen.
  cublasStatus_t MakePlan(const LinearShape& shape, int max_proposals,
                          std::unique_ptr<Plan>* plan) const;
  cublasStatus_t Run(const Plan& plan, const LinearParams& params, cudaStream_t stream) const;
  // Returns the plan whose tuning holds for the shape; null where there is none.
  const Plan* TuningFor(const LinearShape& shape) const;
  // Stores the plan for later launches. Where there are too many, those not tuned are dropped
  // first.
  Plan& Keep(const LinearShape& shape, std::unique_ptr<Plan> plan);

  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  std::map<LinearShape, std::unique_ptr<Plan>> plans_;
};

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_LINEAR_H_
