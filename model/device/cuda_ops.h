// The ops of kernels/cuda on one stream.
#ifndef PREFILLD_MODEL_DEVICE_CUDA_OPS_H_
#define PREFILLD_MODEL_DEVICE_CUDA_OPS_H_

#include <cuda_runtime_api.h>

#include <cstddef>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/cuda/gated_linear.h"
#include "kernels/cuda/linear.h"
#include "model/device/cuda_recordings.h"
#include "model/device/cuda_status.h"
#include "model/device/device.h"

namespace prefilld::model {

class CudaOps final : public Ops {
 public:
  // All parameters are borrowed and must outlive the ops. When the scratch of ops moves,
  // `recordings` are cleared, because they hold its address.
  CudaOps(Device* device, cudaStream_t stream, CudaFault* fault, CudaRecordings* recordings)
      : device_(*device), stream_(stream), fault_(*fault), recordings_(*recordings) {}

  // Allocates the workspace of products. Must be called before any op.
  absl::Status Initialize();

  absl::Status Embedding(const kernels::EmbeddingParams& params) override;
  absl::Status RmsNorm(const kernels::RmsNormParams& params) override;
  absl::Status Linear(const kernels::LinearParams& params) override;
  absl::Status GatedLinear(const kernels::GatedLinearParams& params) override;
  absl::Status QkvRope(const kernels::QkvRopeParams& params) override;
  absl::Status TokenLogprobs(const kernels::TokenLogprobsParams& params) override;
  absl::Status TuneLinear(const kernels::LinearParams& params) override;
  absl::Status TuneGatedLinear(const kernels::GatedLinearParams& params) override;
  absl::Status Attention(const kernels::AttentionParams& params) override;
  absl::Status PagedAttention(const kernels::PagedAttentionParams& params) override;
  absl::Status ReserveAttention(const kernels::AttentionParams& largest, bool block_mass) override;
  absl::Status AntidiagonalScores(const kernels::AntidiagonalScoresParams& params) override;
  absl::Status ReserveAntidiagonalScores(const kernels::AntidiagonalScoresParams& largest) override;
  absl::Status Estimate(const kernels::EstimateParams& params) override;
  absl::Status VerticalSlash(const kernels::VerticalSlashParams& params) override;
  absl::Status ExpandVerticalSlash(const kernels::ExpandVerticalSlashParams& params) override;
  absl::Status SelectRows(const kernels::SelectRowsParams& params) override;
  absl::Status MeasurePattern(const kernels::MeasurePatternParams& params) override;
  absl::Status PooledMass(const kernels::PooledMassParams& params) override;

 private:
  // Turn the result of launching or tuning a product into a status; its message has the shape.
  absl::Status LinearStatus(const kernels::cuda::LaunchStatus& launch,
                            const kernels::LinearParams& params);
  absl::Status GatedLinearStatus(const kernels::cuda::LaunchStatus& launch,
                                 const kernels::GatedLinearParams& params);
  absl::Status CheckProduct(const kernels::cuda::LaunchStatus& launch, absl::string_view product);
  // Turns the result of a launcher, which refuses shapes as invalid values, into a status.
  absl::Status CheckLaunch(const kernels::cuda::LaunchStatus& launch, absl::string_view op,
                           int head_dim, int block_tokens);
  template <typename Params>
  absl::Status Launch(const char* op, cudaError_t (*launch)(const Params&, cudaStream_t),
                      const Params& params, int head_dim = 0, int block_tokens = 0);
  // Makes scratch_ at least `bytes` long.
  absl::Status ReserveScratch(int64_t bytes);

  Device& device_;
  const cudaStream_t stream_;
  CudaFault& fault_;
  CudaRecordings& recordings_;

  DeviceBuffer linear_workspace_;
  kernels::cuda::LinearLauncher linear_;
  kernels::cuda::GatedLinearLauncher gated_linear_{&linear_};
  // Attention and antidiagonal scores use it in turns. It grows to what the largest call needs.
  DeviceBuffer scratch_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_OPS_H_
