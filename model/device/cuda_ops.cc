#include "model/device/cuda_ops.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/antidiagonal_scores.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/pattern.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

namespace cuda = kernels::cuda;

}  // namespace

absl::Status CudaOps::Initialize() {
  PREFILLD_ASSIGN_OR_RETURN(linear_workspace_,
                            device_.Allocate(cuda::LinearLauncher::kWorkspaceBytes));
  return CudaStatus(linear_.Initialize(linear_workspace_.data(), linear_workspace_.bytes()),
                    "cuBLASLt");
}

absl::Status CudaOps::CheckLaunch(const cuda::LaunchStatus& launch, absl::string_view op,
                                  int head_dim, int block_tokens) {
  absl::Status status = fault_.Check(launch, op);
  return launch.cuda() == cudaErrorInvalidValue ? UnsupportedShape(op, head_dim, block_tokens)
                                                : status;
}

template <typename Params>
absl::Status CudaOps::Launch(const char* op, cudaError_t (*launch)(const Params&, cudaStream_t),
                             const Params& params, int head_dim, int block_tokens) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return CheckLaunch(launch(params, stream_), op, head_dim, block_tokens);
}

absl::Status CudaOps::Embedding(const kernels::EmbeddingParams& params) {
  return Launch("embedding", cuda::LaunchEmbedding, params);
}

absl::Status CudaOps::RmsNorm(const kernels::RmsNormParams& params) {
  return Launch("rms norm", cuda::LaunchRmsNorm, params);
}

absl::Status CudaOps::QkvRope(const kernels::QkvRopeParams& params) {
  return Launch("qkv rope", cuda::LaunchQkvRope, params, params.head_dim);
}

absl::Status CudaOps::TokenLogprobs(const kernels::TokenLogprobsParams& params) {
  return Launch("token logprobs", cuda::LaunchTokenLogprobs, params);
}

absl::Status CudaOps::PagedAttention(const kernels::PagedAttentionParams& params) {
  return Launch("paged attention", cuda::LaunchPagedAttention, params, params.head_dim);
}

absl::Status CudaOps::Estimate(const kernels::EstimateParams& params) {
  const auto launch = +[](const kernels::EstimateParams& p, cudaStream_t stream) {
    return cuda::LaunchEstimate(p, stream);
  };
  return Launch("estimate", launch, params, params.head_dim, params.block_tokens);
}

absl::Status CudaOps::VerticalSlash(const kernels::VerticalSlashParams& params) {
  return Launch("vertical slash", cuda::LaunchVerticalSlash, params);
}

absl::Status CudaOps::ExpandVerticalSlash(const kernels::ExpandVerticalSlashParams& params) {
  return Launch("expand vertical slash", cuda::LaunchExpandVerticalSlash, params);
}

absl::Status CudaOps::SelectRows(const kernels::SelectRowsParams& params) {
  return Launch("select rows", cuda::LaunchSelectRows, params);
}

absl::Status CudaOps::MeasurePattern(const kernels::MeasurePatternParams& params) {
  return Launch("measure pattern", cuda::LaunchMeasurePattern, params);
}

absl::Status CudaOps::PooledMass(const kernels::PooledMassParams& params) {
  return Launch("pooled mass", cuda::LaunchPooledMass, params, params.head_dim,
                params.block_tokens);
}

absl::Status CudaOps::Linear(const kernels::LinearParams& params) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return LinearStatus(linear_.Launch(params, stream_), params);
}

absl::Status CudaOps::TuneLinear(const kernels::LinearParams& params) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return LinearStatus(linear_.Tune(params, stream_), params);
}

absl::Status CudaOps::LinearStatus(const cuda::LaunchStatus& launch,
                                   const kernels::LinearParams& params) {
  if (launch.ok()) return absl::OkStatus();
  return CheckProduct(launch,
                      absl::StrCat("linear [", params.num_tokens, ", ", params.in_features, "] x [",
                                   params.out_features, ", ", params.in_features, "]^T"));
}

absl::Status CudaOps::CheckProduct(const cuda::LaunchStatus& launch, absl::string_view product) {
  // A fault of an earlier kernel shows here as a failure of cuBLASLt.
  PREFILLD_RETURN_IF_ERROR(fault_.Check(cudaPeekAtLastError(), product));
  return CheckLaunch(launch, product, /*head_dim=*/0, /*block_tokens=*/0);
}

absl::Status CudaOps::GatedLinear(const kernels::GatedLinearParams& params) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return GatedLinearStatus(gated_linear_.Launch(params, stream_), params);
}

absl::Status CudaOps::TuneGatedLinear(const kernels::GatedLinearParams& params) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  absl::Status status = GatedLinearStatus(gated_linear_.Tune(params, stream_), params);
  if (status.ok()) {
    spdlog::info("gate, up and SwiGLU: {}",
                 gated_linear_.IsFused(params) ? "one kernel" : "cuBLASLt's product, then SwiGLU");
  }
  return status;
}

absl::Status CudaOps::GatedLinearStatus(const cuda::LaunchStatus& launch,
                                        const kernels::GatedLinearParams& params) {
  if (launch.ok()) return absl::OkStatus();
  return CheckProduct(
      launch, absl::StrCat("gate, up and SwiGLU of [", params.num_tokens, ", ", params.in_features,
                           "] x [", 2 * params.intermediate, ", ", params.in_features, "]^T"));
}

absl::Status CudaOps::ReserveScratch(int64_t bytes) {
  if (bytes <= static_cast<int64_t>(scratch_.bytes())) return absl::OkStatus();
  // This happens in the step path only if a call is larger than what was reserved. Recordings hold
  // the old address.
  PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
  recordings_.Clear();
  scratch_ = DeviceBuffer();
  PREFILLD_ASSIGN_OR_RETURN(scratch_, device_.Allocate(static_cast<size_t>(bytes)));
  return absl::OkStatus();
}

absl::Status CudaOps::ReserveAttention(const kernels::AttentionParams& largest, bool block_mass) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return ReserveScratch(cuda::MaxAttentionScratchBytes(largest, block_mass));
}

absl::Status CudaOps::Attention(const kernels::AttentionParams& params) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  PREFILLD_RETURN_IF_ERROR(ReserveScratch(cuda::AttentionScratchBytes(params)));
  return CheckLaunch(cuda::LaunchAttention(params, scratch_.data(), stream_), "attention",
                     params.head_dim, params.block_tokens);
}

absl::Status CudaOps::ReserveAntidiagonalScores(const kernels::AntidiagonalScoresParams& largest) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return ReserveScratch(cuda::AntidiagonalScratchBytes(largest));
}

absl::Status CudaOps::AntidiagonalScores(const kernels::AntidiagonalScoresParams& params) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  PREFILLD_RETURN_IF_ERROR(ReserveScratch(cuda::AntidiagonalScratchBytes(params)));
  return CheckLaunch(cuda::LaunchAntidiagonalScores(params, scratch_.data(), stream_),
                     "antidiagonal scores", params.head_dim, params.block_tokens);
}

}  // namespace prefilld::model
